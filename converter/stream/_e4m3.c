/* E4M3 codes and what they miss, largest magnitudes and products on the CPU, one pass each. Called from compiled.py by
 * ctypes; quantize.py, weight_error.py and merging.py say what is computed. Compile with -ffp-contract=off: a fused
 * multiply-add would round once where the formula rounds twice.
 */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Which clone runs is chosen when the library is loaded. */
#if defined(PLAIN) || !defined(__x86_64__) || !defined(__linux__) || !defined(__GNUC__) || defined(__clang__)
#define FOR_THIS_CPU
#elif __GNUC__ < 12
#define FOR_THIS_CPU __attribute__((target_clones("avx2", "default")))
#else
#define FOR_THIS_CPU __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#endif

#if defined(__GNUC__)
#define INLINE inline __attribute__((always_inline)) /* into each clone, to be compiled for its CPU */
#else
#define INLINE inline
#endif

enum { PIECE = 1024 }; /* codes made at a time: they may overwrite their source, so they are made beside it */

static inline float float_of(uint32_t bits) { float value; memcpy(&value, &bits, sizeof value); return value; }
static inline uint32_t bits_of(float value) { uint32_t bits; memcpy(&bits, &value, sizeof bits); return bits; }

static inline float from_f32(uint32_t bits) { return float_of(bits); }
static inline float from_bf16(uint16_t bits) { return float_of((uint32_t)bits << 16); }

/* Finite values only. Subnormals are counts of 2^-24, the units of the floats from 1/2 on; no float32 subnormal is made,
 * which a process may have told the CPU to take for zero.
 */
static inline float from_f16(uint16_t bits) {
    uint32_t magnitude = bits & 0x7fff, subnormal = -(uint32_t)(magnitude < 0x400);
    uint32_t small = bits_of(float_of(0x3f000000 | magnitude) - 0.5f), normal = (magnitude << 13) + 0x38000000;
    return float_of((small & subnormal) | (normal & ~subnormal) | (uint32_t)(bits & 0x8000) << 16);
}

/* A float in units of 2^-14, rounded to nearest, ties to even: floats from 512 to 1024, among which base + v must be, are
 * that far apart.
 */
static inline int32_t fixed(float v, float base) { return (int32_t)(bits_of(v + base) - bits_of(base)); }

/* The nearest E4M3 code of a float that is not NaN: ties to even, +-448 for all that is larger. Around y the codes are
 * 2^(e-3) apart, with e the exponent of y but at least -6; a float32 of 2^(e+20) has units of that size, so adding it
 * rounds |y| and leaves the count of units in the low bits. The count has the implicit bit of normal values in it, so
 * codes go on from exponent to exponent. weight, error: |y|, at most 448, and |y| less its code's value, as `fixed`.
 */
static inline uint8_t code_of(float y, int32_t *weight, int32_t *error) {
    uint32_t bits = bits_of(y), magnitude = bits & 0x7fffffff;
    magnitude = magnitude < 0x43e00000 ? magnitude : 0x43e00000;         /* 448 */
    uint32_t at_least = magnitude > 0x3c800000 ? magnitude : 0x3c800000; /* 2^-6 */
    uint32_t power = (at_least & 0x7f800000) + (20 << 23);               /* 2^(e+20) */
    float sum = float_of(magnitude) + float_of(power);
    uint32_t code = bits_of(sum) + (power >> 20) - ((121 + 20) << 3); /* the count, below power's bits, + 8 (e + 6) */
    *weight = fixed(float_of(magnitude), 512);
    *error = fixed(float_of(magnitude) - (sum - float_of(power)), 768);
    return (uint8_t)((bits >> 24 & 0x80) | (code & 0x7f));
}

static inline size_t least(size_t a, size_t b) { return a < b ? a : b; }

/* sums[0] += weights^2, sums[1] += errors^2: of integers, so that their order does not matter. */
static INLINE void add_squares(const int32_t *weights, const int32_t *errors, size_t n, int64_t *sums) {
    int64_t signal = 0, noise = 0;
    for (size_t i = 0; i < n; i++) {
        signal += (int64_t)weights[i] * weights[i];
        noise += (int64_t)errors[i] * errors[i];
    }
    sums[0] += signal;
    sums[1] += noise;
}

/* counts[0] += how many codes are +-448, counts[1] += how many are subnormal; returns how many are zero. At most PIECE,
 * and mostly there is none of the kind in them, which shows sooner.
 */
static INLINE int64_t count_codes(const uint8_t *codes, size_t n, int64_t *counts) {
    uint8_t smallest = 0x7f, largest = 0;
    uint16_t saturated = 0, subnormal = 0, zero = 0;
    for (size_t i = 0; i < n; i++) {
        uint8_t code = codes[i] & 0x7f;
        smallest = code < smallest ? code : smallest;
        largest = code > largest ? code : largest;
    }
    if (smallest >= 8 && largest < 0x7e) return 0;
    for (size_t i = 0; i < n; i++) {
        uint8_t code = codes[i] & 0x7f;
        saturated += code == 0x7e;
        subnormal += (uint8_t)(code - 1) < 7;
        zero += code == 0;
    }
    counts[0] += saturated;
    counts[1] += subnormal;
    return zero;
}

/* out[r][c] = code of x[r][c] * factors[c / width]; out may begin where x does. Unless sums is NULL, what the codes miss
 * is added to counts[2], as in count_codes, and to sums[r][c / width][3]: squares of weights and errors, and how many
 * codes are zero whose x is not.
 */
#define DEFINE_CODES(NAME, TYPE, FLOAT, MAGNITUDE)                                                                \
    FOR_THIS_CPU void NAME(const TYPE *x, uint8_t *out, size_t rows, size_t columns, size_t width,                \
                           const float *factors, int64_t *sums, int64_t *counts) {                                \
        for (; rows; rows--, x += columns, out += columns)                                                        \
            for (size_t run = 0; run * width < columns; run++, sums += sums ? 3 : 0) {                            \
                size_t end = least((run + 1) * width, columns);                                                   \
                float factor = factors[run];                                                                      \
                for (size_t column = run * width; column < end; column += PIECE) {                                \
                    const TYPE *from = x + column;                                                                \
                    size_t n = least(end - column, PIECE);                                                        \
                    uint8_t codes[PIECE];                                                                         \
                    int32_t weights[PIECE], errors[PIECE], no_weight, no_error;                                   \
                    if (sums) {                                                                                   \
                        for (size_t i = 0; i < n; i++)                                                            \
                            codes[i] = code_of(FLOAT(from[i]) * factor, &weights[i], &errors[i]);                 \
                        add_squares(weights, errors, n, sums);                                                    \
                        int64_t vanished = count_codes(codes, n, counts);                                         \
                        if (vanished)                                                                             \
                            for (size_t i = 0; i < n; i++) vanished -= !(from[i] & MAGNITUDE);                    \
                        sums[2] += vanished;                                                                      \
                    } else                                                                                        \
                        for (size_t i = 0; i < n; i++)                                                            \
                            codes[i] = code_of(FLOAT(from[i]) * factor, &no_weight, &no_error);                   \
                    memcpy(out + column, codes, n);                                                               \
                }                                                                                                 \
            }                                                                                                     \
    }

/* largest[k] = max of the bits of |x[r][c]| over all r and c with c / width == k; floats order as their bits do. */
#define DEFINE_AMAX(NAME, TYPE, MAGNITUDE)                                                                        \
    FOR_THIS_CPU void NAME(const TYPE *x, size_t rows, size_t columns, size_t width, TYPE *largest) {             \
        memset(largest, 0, (columns + width - 1) / width * sizeof *largest);                                      \
        for (; rows; rows--, x += columns)                                                                        \
            for (size_t run = 0; run * width < columns; run++) {                                                  \
                size_t end = least((run + 1) * width, columns);                                                   \
                TYPE most = largest[run];                                                                         \
                for (size_t column = run * width; column < end; column++) {                                       \
                    TYPE magnitude = x[column] & MAGNITUDE;                                                       \
                    most = magnitude > most ? magnitude : most;                                                   \
                }                                                                                                 \
                largest[run] = most;                                                                              \
            }                                                                                                     \
    }

DEFINE_CODES(codes_bf16, uint16_t, from_bf16, 0x7fff)
DEFINE_CODES(codes_f16, uint16_t, from_f16, 0x7fff)
DEFINE_CODES(codes_f32, uint32_t, from_f32, 0x7fffffff)
DEFINE_AMAX(amax_16, int16_t, 0x7fff)
DEFINE_AMAX(amax_32, int32_t, 0x7fffffff)

/* out[r][c] = the sum of b[r][k] * a[k][c] over k in order, rounded to float32 at each step. The product is exact in
 * double, whose sum is then rounded to float32: with an FMA or without it, the same bits.
 */
FOR_THIS_CPU void product_f32(const float *b, const float *a, float *out, size_t rows, size_t rank, size_t columns) {
    for (size_t row = 0; row < rows; row++, b += rank, out += columns)
        for (size_t column = 0; column < columns; column += PIECE) {
            size_t n = least(columns - column, PIECE);
            float sums[PIECE] = {0};
            for (size_t k = 0; k < rank; k++) {
                double factor = b[k];
                const float *from = a + k * columns + column;
                for (size_t i = 0; i < n; i++) sums[i] = (float)((double)sums[i] + factor * (double)from[i]);
            }
            memcpy(out + column, sums, n * sizeof *sums);
        }
}

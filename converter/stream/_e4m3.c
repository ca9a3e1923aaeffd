/* E4M3 codes, largest magnitudes and products on the CPU, one pass each. Called from compiled.py by ctypes; quantize.py
 * and merging.py say what is computed. Compile with -ffp-contract=off: a fused multiply-add would round once where the
 * formula rounds twice.
 */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_THIS_CPU __attribute__((target_clones("avx2", "default"))) /* chosen when the library is loaded */
#else
#define FOR_THIS_CPU
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

/* The nearest E4M3 code of a float that is not NaN: ties to even, +-448 for all that is larger. Around y the codes are
 * 2^(e-3) apart, with e the exponent of y but at least -6; a float32 of 2^(e+20) has units of that size, so adding it
 * rounds |y| and leaves the count of units in the low bits. The count has the implicit bit of normal values in it, so
 * codes go on from exponent to exponent.
 */
static inline uint8_t code_of(float y) {
    uint32_t bits = bits_of(y), magnitude = bits & 0x7fffffff;
    magnitude = magnitude < 0x43e00000 ? magnitude : 0x43e00000;         /* 448 */
    uint32_t at_least = magnitude > 0x3c800000 ? magnitude : 0x3c800000; /* 2^-6 */
    uint32_t power = (at_least & 0x7f800000) + (20 << 23);               /* 2^(e+20) */
    uint32_t units = bits_of(float_of(magnitude) + float_of(power));     /* the count, below power's bits */
    uint32_t code = units + (power >> 20) - ((121 + 20) << 3);           /* + 8 (e + 6) */
    return (uint8_t)((bits >> 24 & 0x80) | (code & 0x7f));
}

static inline size_t least(size_t a, size_t b) { return a < b ? a : b; }

/* out[r][c] = code of x[r][c] * factors[c / width]; out may begin where x does. */
#define DEFINE_CODES(NAME, TYPE, FLOAT)                                                                           \
    FOR_THIS_CPU void NAME(const TYPE *x, uint8_t *out, size_t rows, size_t columns, size_t width,                \
                           const float *factors) {                                                                \
        for (; rows; rows--, x += columns, out += columns)                                                        \
            for (size_t run = 0; run * width < columns; run++) {                                                  \
                size_t end = least((run + 1) * width, columns);                                                   \
                float factor = factors[run];                                                                      \
                for (size_t column = run * width; column < end; column += PIECE) {                                \
                    size_t n = least(end - column, PIECE);                                                        \
                    uint8_t codes[PIECE];                                                                         \
                    for (size_t i = 0; i < n; i++) codes[i] = code_of(FLOAT(x[column + i]) * factor);             \
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

DEFINE_CODES(codes_bf16, uint16_t, from_bf16)
DEFINE_CODES(codes_f16, uint16_t, from_f16)
DEFINE_CODES(codes_f32, uint32_t, from_f32)
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

"""The style and the script of a comparison's page."""

STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2.5rem } h3 { font-size: 1rem; margin-bottom: 0 }
.verdict { font-size: 1.1rem }
.problems { border-left: 4px solid #d55e00; padding: .5rem 2rem }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid #8886; padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top }
.views { display: flex; flex-wrap: wrap; gap: .5rem }
figure { margin: 0 } figcaption { font-size: .85rem }
img { image-rendering: pixelated; max-width: 100%; height: auto; background: repeating-conic-gradient(#8884 0 25%,
#0000 0 50%) 0 0/16px 16px }
.stage { display: inline-block; margin-top: .5rem; max-width: 100% } .stage:focus { outline: 3px solid #0072b2 }
button { font: inherit; padding: .1rem .6rem; margin: 0 .3rem .3rem 0 } button[aria-pressed=true] { font-weight: bold }
pre { overflow-x: auto; background: #8881; padding: 1rem }
svg { max-width: 100%; height: auto }
"""

SCRIPT = """
for (const part of document.querySelectorAll('.case')) {
  const views = [...part.querySelectorAll('figure img')], stage = part.querySelector('.stage');
  const large = stage.querySelector('img'), shows = [...part.querySelectorAll('.show')];
  const flicker = part.querySelector('.flicker');
  let at = 0, timer = null;
  const show = i => {
    at = (i + views.length) % views.length;
    large.src = views[at].src; large.alt = views[at].alt;
    shows.forEach((b, j) => b.setAttribute('aria-pressed', String(j === at)));
  };
  const swap = () => show(at === 0 ? 1 : 0);
  const flick = on => {
    clearInterval(timer);
    timer = on ? setInterval(swap, 500) : null;
    flicker.setAttribute('aria-pressed', String(on));
  };
  shows.forEach((b, i) => b.addEventListener('click', () => { flick(false); show(i); }));
  flicker.addEventListener('click', () => flick(timer === null));
  stage.addEventListener('click', () => { flick(false); swap(); });
  stage.addEventListener('keydown', event => {
    const digit = Number(event.key);
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (digit >= 1 && digit <= views.length) { flick(false); show(digit - 1); }
    else if (event.key === 'ArrowRight') { flick(false); show(at + 1); }
    else if (event.key === 'ArrowLeft') { flick(false); show(at - 1); }
    else if (event.key === ' ') { flick(false); swap(); }
    else if (event.key === 'f' || event.key === 'F') flick(timer === null);
    else return;
    event.preventDefault();
  });
  show(0);
}
"""

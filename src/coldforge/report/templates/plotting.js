// What the scripts of a run's page and of a sweep's page share; written before them into the same script element.
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const escapeText = (words) => String(words).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif";

// Draw again when the width of the plot or the colour scheme changes.
function keepDrawn(node, draw) {
  let timer = 0;
  let lastWidth = node.clientWidth;
  window.addEventListener("resize", () => {
    clearTimeout(timer);
    timer = setTimeout(() => { if (node.clientWidth !== lastWidth) { lastWidth = node.clientWidth; draw(); } }, 120);
  });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}

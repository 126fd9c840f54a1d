"use strict";

// Light or dark: what the system says, until the button is pressed.
const theme = document.getElementById("theme");
theme.hidden = false;
theme.addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});

// Charts: the values under the pointer.
const short = (v) => (v === null ? "–" : Math.abs(v) >= 1e4 || (v && Math.abs(v) < 1e-3) ? v.toExponential(2) : String(+v.toPrecision(4)));

for (const figure of document.querySelectorAll("[data-chart]")) {
  const chart = JSON.parse(figure.dataset.chart);
  const svg = figure.querySelector("svg"), cursor = figure.querySelector(".cursor"), output = figure.querySelector("output");
  const [left, right] = [52, 520 - 14];
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const share = ((event.clientX - box.left) / box.width * 520 - left) / (right - left);
    const step = chart.x[0] + Math.min(1, Math.max(0, share)) * (chart.x[1] - chart.x[0]);
    let at = null;
    const values = chart.lines.map((line) => {
      let best = 0;
      line.x.forEach((x, i) => { if (Math.abs(x - step) < Math.abs(line.x[best] - step)) best = i; });
      at = at === null || Math.abs(line.x[best] - step) < Math.abs(at - step) ? line.x[best] : at;
      return (chart.lines.length > 1 ? line.name + " " : "") + short(line.y[best]);
    });
    const x = left + (at - chart.x[0]) / (chart.x[1] - chart.x[0]) * (right - left);
    cursor.setAttribute("x1", x); cursor.setAttribute("x2", x); cursor.style.visibility = "visible";
    output.textContent = `step ${Math.round(at)}: ${values.join(", ")}`;
  });
  svg.addEventListener("pointerleave", () => { cursor.style.visibility = "hidden"; output.textContent = ""; });
}

// Samples: the attention of the chosen word in the chosen map.
for (const sample of document.querySelectorAll(".sample")) {
  const words = [...sample.querySelectorAll("button.word")], select = sample.querySelector("select");
  const items = [...sample.querySelectorAll("[data-attention]")].map((figure) => {
    const attention = JSON.parse(figure.dataset.attention);
    attention.bytes = Uint8Array.from(atob(attention.map), (c) => c.charCodeAt(0));
    return { attention, cells: [...figure.querySelectorAll(".map i")], output: figure.querySelector("figcaption output") };
  });
  if (!items.length) continue;
  let chosen = 0;
  const show = (word) => {
    const row = Number(select.value) * items[0].attention.words + word;
    for (const { attention, cells, output } of items) {
      cells.forEach((cell, i) => cell.style.setProperty("--a", (attention.bytes[row * attention.cells + i] || 0) / 255));
      output.textContent = `${Math.round(attention.share[row] * 100)}% of attention`;
    }
  };
  words.forEach((button, i) => {
    button.addEventListener("click", () => {
      chosen = i;
      words.forEach((other, j) => other.setAttribute("aria-pressed", String(i === j)));
      show(chosen);
    });
    button.addEventListener("pointerenter", () => show(i));
    button.addEventListener("pointerleave", () => show(chosen));
  });
  select.addEventListener("change", () => show(chosen));
}

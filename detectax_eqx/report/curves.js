// The page of a training run's curves, with one chart per section.

const data = JSON.parse(byId("data").textContent);
const COLORS = ["#2f6fb2", "#d1812b", "#3f9a5f", "#b4488f", "#7a63c2", "#a08a1d", "#4aa3a8"];

// A number with three significant digits.
const short = (value) => String(Number(value.toPrecision(3)));

// Ticks at about `count` round numbers between two bounds.
function ticks(from, to, count = 5) {
  const raw = (to - from) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((factor) => power * factor >= raw);
  const first = Math.ceil(from / step);
  return Array.from({ length: Math.floor(to / step) - first + 1 }, (_, i) => ({
    at: (first + i) * step, text: short((first + i) * step),
  }));
}

function section({ title, curves }) {
  const values = curves.flatMap((curve) => curve.ys);
  const top = 1.05 * Math.max(...values, 1e-12);
  const series = curves.map((curve, i) => ({ ...curve, color: COLORS[i % COLORS.length], width: i ? 1.3 : 2.2, title: curve.name }));
  const entries = series.map((curve) => element("span", {},
    element("span", { class: "swatch", style: `background:${curve.color}` }), `${curve.name} ${short(curve.ys.at(-1))}`));
  return element("section", {},
    element("h2", {}, title),
    chart({
      series, dots: series.flatMap((curve) => curve.xs.length < 30 ? curve.xs.map((x, i) => ({
        x, y: curve.ys[i], r: 2, color: curve.color, title: `${curve.name}, step ${x}: ${short(curve.ys[i])}`,
      })) : []),
      x: { from: 0, to: data.total, label: "step" }, y: { from: 0, to: top, label: "" },
      xTicks: ticks(0, data.total), yTicks: ticks(0, top),
    }),
    element("p", { class: "controls small" }, ...entries));
}

byId("title").textContent = data.title;
byId("subtitle").textContent = data.subtitle;
fill("main", ...data.charts.filter((one) => one.curves.some((curve) => curve.ys.length)).map((one) => section({
  ...one, curves: one.curves.filter((curve) => curve.ys.length),
})));
if (data.reload) setTimeout(() => location.reload(), 1000 * data.reload);

// Elements, tables and charts that all pages use.

function element(name, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "rect", "line", "circle", "text", "image", "polyline", "pattern", "defs", "title"];
  const node = svg.includes(name)
    ? document.createElementNS("http://www.w3.org/2000/svg", name)
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "onclick") node.addEventListener("click", value);
    else if (value !== null && value !== false) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

const byId = (id) => document.getElementById(id);
const fill = (id, ...children) => byId(id).replaceChildren(...children);
const points = (value) => (value === null || value < 0 ? "–" : (100 * value).toFixed(1));
const fixed = (digits) => (value) => (value === null ? "–" : value.toFixed(digits));

// columns: [{name, get(row), show(value)?, node(row)?, title?}]. A click on a heading sorts by that column: text in
// ascending order first, numbers in descending order first.
function sortableTable(table, columns, rows, { onclick = null, chosen = () => false } = {}) {
  let order = null;
  const body = element("tbody");
  const draw = () => {
    const sorted = [...rows];
    if (order) {
      const { column, sign } = order;
      sorted.sort((a, b) => {
        const [x, y] = [column.get(a), column.get(b)];
        return sign * (typeof x === "string" ? x.localeCompare(y) : (x ?? -Infinity) - (y ?? -Infinity));
      });
    }
    body.replaceChildren(...sorted.map((row) => {
      const cells = columns.map((c) => element("td", {}, c.node ? c.node(row) : (c.show ?? String)(c.get(row))));
      const line = element("tr", { class: chosen(row) ? "chosen" : null }, ...cells);
      if (onclick) line.addEventListener("click", () => { onclick(row); draw(); });
      return line;
    }));
  };
  const headings = columns.map((column) => element("th", {
    "data-sort": "", title: column.title ?? null, onclick: () => {
      const sign = order?.column === column ? -order.sign : typeof column.get(rows[0] ?? {}) === "string" ? 1 : -1;
      order = { column, sign };
      draw();
    },
  }, column.name));
  table.replaceChildren(element("thead", {}, element("tr", {}, ...headings)), body);
  draw();
}

// rows: [{name, value, note, bad}]. The value determines the length of the bar.
function barRows(id, rows) {
  const most = Math.max(1e-9, ...rows.map((row) => row.value));
  fill(id, ...rows.flatMap((row) => [
    element("span", {}, row.name),
    element("div", {}, element("div", {
      class: row.bad ? "bar bad" : "bar", style: `width:${Math.max(0, (100 * row.value) / most)}%`,
    })),
    element("span", { class: "faint" }, row.note),
  ]));
}

// series: [{xs, ys, color, width, dash, opacity, title}]; dots: [{x, y, r, color, opacity, title}];
// x, y: {from, to, label}, the ranges of the axes; xTicks, yTicks: [{at, text}].
function chart({ series = [], dots = [], x, y, xTicks, yTicks, width = 480, height = 330 }) {
  const [left, right, top, bottom] = [42, 12, 10, 36];
  const px = (v) => left + ((v - x.from) / (x.to - x.from || 1)) * (width - left - right);
  const py = (v) => height - bottom - ((v - y.from) / (y.to - y.from || 1)) * (height - top - bottom);
  const svg = element("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img" });
  for (const tick of xTicks) {
    svg.append(
      element("line", { class: "axis", x1: px(tick.at), x2: px(tick.at), y1: top, y2: height - bottom }),
      element("text", { x: px(tick.at), y: height - bottom + 14, "text-anchor": "middle" }, tick.text),
    );
  }
  for (const tick of yTicks) {
    svg.append(
      element("line", { class: "axis", x1: left, x2: width - right, y1: py(tick.at), y2: py(tick.at) }),
      element("text", { x: left - 5, y: py(tick.at) + 4, "text-anchor": "end" }, tick.text),
    );
  }
  svg.append(
    element("text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, x.label),
    element("text", {
      x: 12, y: (top + height - bottom) / 2, "text-anchor": "middle",
      transform: `rotate(-90 12 ${(top + height - bottom) / 2})`,
    }, y.label),
  );
  for (const line of series) {
    const path = line.xs.map((value, i) => `${px(value).toFixed(1)},${py(line.ys[i]).toFixed(1)}`).join(" ");
    svg.append(element("polyline", {
      points: path, fill: "none", stroke: line.color, "stroke-width": line.width ?? 1.5,
      "stroke-dasharray": line.dash ?? null, opacity: line.opacity ?? null, "stroke-linejoin": "round",
    }, element("title", {}, line.title ?? "")));
  }
  for (const dot of dots) {
    const at = { cx: px(dot.x), cy: py(dot.y), r: dot.r ?? 3, fill: dot.color, "fill-opacity": dot.opacity ?? 0.7 };
    svg.append(element("circle", at, element("title", {}, dot.title ?? "")));
  }
  return svg;
}

const tenths = (step) => Array.from({ length: Math.round(1 / step) + 1 }, (_, i) => ({
  at: i * step, text: (i * step).toFixed(1),
}));

function options(select, entries) {
  select.replaceChildren(...entries.map(([value, text]) => element("option", { value }, text)));
}

// Converts a mask from COCO's compressed run lengths to an SVG path with one rectangle per run in a column.
function maskPath(counts, height) {
  const runs = [];
  for (let at = 0; at < counts.length;) {
    let value = 0, shift = 0, more = true;
    while (more) {
      const code = counts.charCodeAt(at++) - 48;
      value |= (code & 31) << shift;
      shift += 5;
      more = (code & 32) !== 0;
      if (!more && code & 16) value |= -1 << shift;
    }
    runs.push(runs.length > 2 ? value + runs[runs.length - 2] : value);
  }
  let path = "", pixel = 0;
  runs.forEach((length, i) => {
    if (i % 2) {
      for (let from = pixel; from < pixel + length;) {
        const [x, y] = [Math.floor(from / height), from % height];
        const rows = Math.min(height - y, pixel + length - from);
        path += `M${x} ${y}h1v${rows}h-1z`;
        from += rows;
      }
    }
    pixel += length;
  });
  return path;
}

// image: {src, width, height, mask_width, mask_height}; shapes: [{box, color, text, title, wrong, dim, mask, crowd}].
// The first shape is on top.
function picture(image, shapes, { onclick = null, masks = true } = {}) {
  const size = { width: image.width, height: image.height };
  const svg = element("svg", { class: "picture", viewBox: `0 0 ${image.width} ${image.height}`, onclick: onclick ?? (() => {}) });
  svg.append(element("image", { href: image.src, ...size }));
  const textSize = Math.max(image.width, image.height) / 26;
  const bottomUp = [...shapes].reverse();
  if (masks) {
    for (const shape of bottomUp.filter((s) => s.mask)) {
      const scale = image.height / image.mask_height;
      svg.append(element("path", {
        class: shape.dim ? "mask dim" : "mask", d: maskPath(shape.mask, image.mask_height), fill: shape.color,
        transform: `scale(${image.width / image.mask_width} ${scale})`,
      }));
    }
  }
  for (const shape of bottomUp) {
    const [x0, y0, x1, y1] = shape.box;
    const at = { x: x0, y: y0, width: Math.max(0, x1 - x0), height: Math.max(0, y1 - y0) };
    const group = element("g", { class: shape.dim ? "dim" : null });
    if (shape.crowd) {
      const id = `stripes${shape.color.replace("#", "")}`;
      const stripes = { id, width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" };
      svg.append(element("defs", {}, element("pattern", stripes,
        element("rect", { width: 3, height: 6, fill: shape.color, "fill-opacity": 0.5 }))));
      group.append(element("rect", { ...at, fill: `url(#${id})` }));
    }
    group.append(
      element("rect", { ...at, class: "halo" }),
      element("rect", { ...at, class: shape.wrong ? "box wrong" : "box", stroke: shape.color }),
      element("title", {}, shape.title ?? shape.text),
    );
    svg.append(group);
  }
  for (const shape of bottomUp.filter((s) => !s.dim && s.text)) {
    const y = shape.box[1] > textSize ? shape.box[1] - 0.25 * textSize : Math.min(image.height - 2, shape.box[1] + textSize);
    // Keep the text inside the image, with an estimated letter width of 0.58 times the font size.
    const x = Math.max(1, Math.min(shape.box[0], image.width - shape.text.length * textSize * 0.58));
    svg.append(element("text", { x, y, "font-size": textSize }, shape.text));
  }
  return svg;
}

function enlarge(...children) {
  const dialog = byId("enlarged");
  dialog.replaceChildren(...children, element("p", {}, element("button", { onclick: () => dialog.close() }, "close")));
  dialog.showModal();
}
document.addEventListener("click", (event) => { if (event.target === byId("enlarged")) event.target.close(); });

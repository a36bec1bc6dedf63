// The page of a dataset. The suspicious annotations that are shown depend only on `state`.

const data = JSON.parse(byId("data").textContent);
const state = { kind: "", class: "", shown: 24 };
const PAGE = 24;

function tableSection({ title, note, columns, rows, bars }) {
  const heading = columns.map((column) => element("th", {}, column));
  const body = rows.map((row) => element("tr", {}, ...row.map((cell, i) => element("td", i !== bars ? {} : {
    class: "share",
    style: `background:linear-gradient(to right, color-mix(in srgb, var(--accent) 35%, transparent) ${parseFloat(cell)}%, transparent 0)`,
  }, cell))));
  return element("section", {},
    element("h2", {}, title), element("p", { class: "small faint" }, note),
    element("div", { class: "scroll small" }, element("table", {},
      element("thead", {}, element("tr", {}, ...heading)), element("tbody", {}, ...body))));
}

function cardOf(entry) {
  const shapes = entry.objects.map((object) => ({
    box: object.box, mask: object.mask, crowd: object.crowd, color: data.classes[object.k].color,
    text: object.suspicious ? data.classes[object.k].name : "", title: data.classes[object.k].name,
    dim: !object.suspicious,
  }));
  const name = element("div", { class: "name" }, `${entry.name} (image ${entry.id}), annotation ${entry.annotation}`);
  const large = () => enlarge(name.cloneNode(true), picture(entry, shapes));
  return element("div", { class: "card" }, name, picture(entry, shapes, { onclick: large }),
    element("div", { class: "chips" }, element("span", { class: "chip" }, entry.kind)),
    element("div", { class: "small" }, entry.what));
}

function show() {
  const listed = data.suspicions.filter((entry) => (state.kind === "" || entry.kind === state.kind)
    && (state.class === "" || entry.objects.some((object) => object.suspicious && object.k === Number(state.class))));
  const kinds = Object.entries(data.counts).filter(([kind]) => state.kind === "" || kind === state.kind);
  const total = kinds.reduce((sum, [, count]) => sum + count, 0);
  byId("count").textContent = `${listed.length} on this page` + (state.class === "" ? `, of ${total} found` : "");
  fill("cards", ...listed.slice(0, state.shown).map(cardOf));
  byId("more").hidden = listed.length <= state.shown;
}

function choose(name, value) {
  state[name] = value;
  state.shown = PAGE;
  show();
}

byId("title").textContent = data.title;
byId("subtitle").textContent = data.subtitle;
byId("suspicious").before(...data.tables.map(tableSection));
options(byId("kind"), [["", "any"], ...Object.entries(data.counts).map(([kind, count]) => [kind, `${kind} (${count})`])]);
options(byId("class"), [["", "any"], ...data.classes.map((one, k) => [String(k), one.name])]);
byId("kind").addEventListener("change", (event) => choose("kind", event.target.value));
byId("class").addEventListener("change", (event) => choose("class", event.target.value));
byId("more").addEventListener("click", () => { state.shown += PAGE; show(); });
show();

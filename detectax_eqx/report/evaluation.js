// The page of an evaluation. Everything that is shown depends only on `state`.

const data = JSON.parse(byId("data").textContent);
const state = { view: 0, kind: "", class: "", score: 0.3, masks: true, shown: 24 };
const PAGE = 24;
const view = () => data.views[state.view];
const swatch = (k) => element("span", { class: "swatch", style: `background:${data.classes[k].color}` });

function showViews() {
  fill("views", ...data.views.map((one, i) => element("button", {
    "aria-pressed": String(i === state.view), onclick: () => { state.view = i; show(); },
  }, one.name)));
  byId("views").hidden = data.views.length < 2;
}

function showNumbers() {
  const names = Object.keys(data.views[0].numbers);
  const heading = element("tr", {}, element("th"), ...data.views.map((one) => element("th", {}, one.name)), element("th"));
  const rows = names.map((name) => element("tr", {}, element("td", {}, name),
    ...data.views.map((one) => element("td", {}, points(one.numbers[name]))),
    element("td", { class: "note" }, data.meanings[name] ?? "")));
  fill("numbers", element("thead", {}, heading), element("tbody", {}, ...rows));
}

function showCosts() {
  const { costs, counts, ap, false_positive_cost, false_negative_cost } = view();
  const cell = (cost) => (ap < 0 ? "–" : (100 * cost).toFixed(1)); // without objects, AP is undefined
  const row = (name, cost, count, bad) => ({ name, value: cost, note: `${cell(cost)}  (${count})`, bad });
  const rows = data.kinds.map((kind, i) => row(kind, costs[i], counts[i], false));
  rows.push(row("false positives", false_positive_cost, counts[6], true));
  rows.push(row("false negatives", false_negative_cost, counts[7], true));
  barRows("costs", rows);
  byId("ap").textContent = points(ap);
  byId("foreground").textContent = byId("foreground2").textContent = data.foreground_iou;
  byId("background").textContent = data.background_iou;
}

function showCurves() {
  const chosen = byId("curve-class").value;
  const series = [];
  const counted = data.classes.map((_, k) => k).filter((k) => view().precision[k]);
  for (const k of counted) {
    const faint = chosen !== "" && Number(chosen) !== k;
    series.push({
      xs: data.recall, ys: view().precision[k], color: `color-mix(in srgb, ${data.classes[k].color}, var(--ink) 22%)`, title: data.classes[k].name,
      opacity: faint ? 0.12 : chosen === "" && counted.length > 20 ? 0.4 : 0.9, width: chosen !== "" && !faint ? 3 : 1.5,
    });
  }
  if (counted.length) {
    const mean = data.recall.map((_, i) => counted.reduce((sum, k) => sum + view().precision[k][i], 0) / counted.length);
    series.push({ xs: data.recall, ys: mean, color: "currentColor", width: chosen === "" ? 2.5 : 1, title: "mean" });
  }
  fill("curves", chart({
    series, x: { from: 0, to: 1, label: "recall" }, y: { from: 0, to: 1.02, label: "precision" },
    xTicks: tenths(0.2), yTicks: tenths(0.2),
  }));
  // With many classes, a legend would be longer than the chart. The table of classes shows their colours too.
  const listed = counted.length <= 12 ? counted : counted.filter((k) => chosen === String(k));
  const entry = (k) => element("span", {}, swatch(k), `${data.classes[k].name} ${points(view().classes[k].ap50)}`);
  fill("legend", ...listed.map(entry), element("span", {}, `mean (thick line) ${points(view().ap)}`));
}

function showCalibration() {
  const { scores, precision, counts, error } = view().calibration;
  const used = counts.map((_, i) => i).filter((i) => counts[i] > 0);
  const most = Math.max(1, ...counts);
  const pick = (values) => used.map((i) => values[i]);
  fill("calibration", chart({
    series: [
      { xs: [0, 1], ys: [0, 1], color: "var(--faint)", width: 1, dash: "4 4", title: "perfect calibration" },
      { xs: pick(scores), ys: pick(precision), color: "var(--accent)", width: 2 },
    ],
    dots: used.map((i) => ({
      x: scores[i], y: precision[i], r: 3 + 9 * Math.sqrt(counts[i] / most), color: "var(--accent)",
      title: `${counts[i]} detections with mean score ${scores[i].toFixed(2)}: ${(100 * precision[i]).toFixed(0)} % correct`,
    })),
    x: { from: 0, to: 1, label: "score" }, y: { from: 0, to: 1.02, label: "precision" },
    xTicks: tenths(0.2), yTicks: tenths(0.2),
  }));
  byId("calibration-error").textContent = error.toFixed(3);
}

function showClasses() {
  const rows = view().classes.map((row, k) => ({ ...row, k, name: data.classes[k].name }));
  const numeric = (name, get, show = points, title = null) => ({ name, get, show, title });
  sortableTable(byId("classes"), [
    { name: "class", get: (row) => row.name, node: (row) => element("span", {}, swatch(row.k), row.name) },
    numeric("objects", (row) => row.objects, String),
    numeric("detections", (row) => row.detections, String),
    numeric("AP", (row) => row.ap), numeric("AP50", (row) => row.ap50),
    numeric("small", (row) => row.aps, points, "AP of objects below 32×32 pixels"),
    numeric("medium", (row) => row.apm, points, "AP of objects from 32×32 to 96×96 pixels"),
    numeric("large", (row) => row.apl, points, "AP of objects above 96×96 pixels"),
    ...data.kinds.map((kind, i) => numeric(kind, (row) => (row.ap50 < 0 ? -1 : row.costs[i]))),
  ], rows, {
    onclick: (row) => choose("class", state.class === String(row.k) ? "" : String(row.k)),
    chosen: (row) => state.class === String(row.k),
  });
}

function showConfusion() {
  const names = [...data.classes.map((one) => one.name), "missed"];
  const heading = names.map((name) => element("th", {}, element("span", {}, name)));
  const rows = view().confusion.map((counts, k) => {
    const total = Math.max(1, counts.reduce((sum, count) => sum + count, 0));
    const name = k < data.classes.length ? data.classes[k].name : "background";
    const cells = counts.map((count, j) => element("td", {
      style: count ? `background:color-mix(in srgb, var(--${k === j ? "accent" : "bad"}) ${Math.round((75 * count) / total) + 5}%, transparent)` : null,
      title: `true class ${name}, predicted class ${names[j]}: ${count} of ${total}`,
    }, count ? String(count) : ""));
    return element("tr", {}, element("th", {}, name), ...cells);
  });
  fill("confusion", element("thead", {}, element("tr", {}, element("th"), ...heading)), element("tbody", {}, ...rows));
  byId("confusion-threshold").textContent = data.confusion_threshold;
}

// The errors of an image that pass the filters: false detections of at least the minimum score, and missed objects.
function errorsOf(image) {
  const fits = (k, kind) => (state.class === "" || Number(state.class) === k) && (state.kind === "" || state.kind === kind);
  const wrong = image.detections
    .filter((found) => found.verdicts[state.view] >= 0 && found.score >= state.score)
    .map((found) => ({ k: found.k, kind: data.kinds[found.verdicts[state.view]], weight: found.score, score: found.score, found }));
  const missed = image.objects
    .filter((object) => object.missed[state.view])
    .map((object) => ({ k: object.k, kind: "missed", weight: 1, score: null, object }));
  return [...missed, ...wrong].filter((error) => fits(error.k, error.kind));
}

function pairOf(image, errors, onclick) {
  const concerned = new Set(errors.map((error) => error.found ?? error.object));
  const concernedIds = new Set(errors.map((error) => error.found?.about[state.view]));
  const filtered = state.class !== "" || state.kind !== "";
  const truth = image.objects.map((object) => ({
    box: object.box, mask: object.mask, crowd: object.crowd, color: data.classes[object.k].color,
    text: data.classes[object.k].name + (object.crowd ? " (crowd)" : object.missed[state.view] ? " missed" : ""),
    wrong: object.missed[state.view], dim: filtered && !concerned.has(object) && !concernedIds.has(object.id),
  }));
  const found = image.detections.filter((one) => one.score >= state.score).map((one) => {
    const verdict = one.verdicts[state.view];
    const kind = verdict >= 0 ? data.kinds[verdict] : verdict === -2 ? "on a crowd" : "correct";
    return {
      box: one.box, mask: one.mask, color: data.classes[one.k].color, wrong: verdict >= 0,
      text: `${data.classes[one.k].name} ${one.score.toFixed(2)}`,
      title: `${data.classes[one.k].name} ${one.score.toFixed(2)}: ${kind}, IoU ${one.ious[state.view].toFixed(2)}`,
      dim: filtered && !concerned.has(one),
    };
  });
  return element("div", { class: "pair" },
    element("figure", {}, picture(image, truth, { onclick, masks: state.masks }), element("figcaption", {}, "ground truth")),
    element("figure", {}, picture(image, found, { onclick, masks: state.masks }), element("figcaption", {}, "prediction")));
}

function cardOf({ image, errors }) {
  const counts = new Map();
  for (const error of errors) {
    const key = `${error.kind}: ${data.classes[error.k].name}`;
    counts.set(key, (counts.get(key) ?? 0) + 1);
  }
  const chips = [...counts].map(([text, count]) => element("span", { class: "chip" }, count > 1 ? `${text} ×${count}` : text));
  const name = element("div", { class: "name" }, `${image.name} (image ${image.id})`);
  const large = () => enlarge(name.cloneNode(true), pairOf(image, errors, null));
  return element("div", { class: "card" }, name, pairOf(image, errors, large), element("div", { class: "chips" }, ...chips));
}

function showImages() {
  const listed = data.images
    .map((image) => ({ image, errors: errorsOf(image) }))
    .filter((entry) => entry.errors.length)
    .map((entry) => ({ ...entry, badness: entry.errors.reduce((sum, error) => sum + error.weight, 0) }))
    .sort((a, b) => b.badness - a.badness);
  fill("cards", ...listed.slice(0, state.shown).map(cardOf));
  byId("image-count").textContent =
    `${listed.length} of the ${data.images.length} images on this page match; the dataset has ${data.num_images}.`;
  byId("more").hidden = listed.length <= state.shown;
  byId("image-score-text").textContent = state.score.toFixed(2);
}

function choose(name, value) {
  state[name] = value;
  state.shown = PAGE;
  byId("image-class").value = state.class;
  byId("image-kind").value = state.kind;
  if (name === "class") {
    byId("curve-class").value = value;
    showCurves();
  }
  showImages();
}

function show() {
  showViews();
  showCosts();
  showCurves();
  showCalibration();
  showClasses();
  showConfusion();
  showImages();
}

byId("title").textContent = data.title;
byId("subtitle").textContent = data.subtitle;
showNumbers();
const classOptions = data.classes.map((one, k) => [String(k), one.name]);
options(byId("curve-class"), [["", "all"], ...classOptions]);
options(byId("image-class"), [["", "any"], ...classOptions]);
options(byId("image-kind"), [["", "any"], ...data.kinds.map((kind) => [kind, kind])]);
byId("curve-class").addEventListener("change", showCurves);
byId("image-class").addEventListener("change", (event) => { choose("class", event.target.value); showClasses(); });
byId("image-kind").addEventListener("change", (event) => choose("kind", event.target.value));
byId("image-score").addEventListener("input", (event) => choose("score", Number(event.target.value)));
byId("image-masks").addEventListener("change", (event) => { state.masks = event.target.checked; showImages(); });
byId("masks-label").hidden = !data.images.some((image) => image.objects.some((object) => object.mask));
byId("more").addEventListener("click", () => { state.shown += PAGE; showImages(); });
show();

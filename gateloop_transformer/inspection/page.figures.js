"use strict";

// Everything comes from the JSON beside this script and is put into the page as text, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const T = data.text.length;
const INFINITE = 65535;
const QUANTILES = ["5 %", "25 %", "median", "75 %", "95 %"];
const byId = (id) => document.getElementById(id);
const gated = data.layers.filter((layer) => layer.heads > 0);

function make(name, options = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(options)) {
    if (key === "class") element.className = value;
    else if (key === "style") Object.assign(element.style, value);
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

function vector(name, options) {
  const element = document.createElementNS("http" + "://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(options)) element.setAttribute(key, value);
  return element;
}

function unpack(text, Kind) {
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let n = 0; n < raw.length; n++) bytes[n] = raw.charCodeAt(n);
  return new Kind(bytes.buffer);
}

for (const layer of gated) {
  layer.life = unpack(layer.life, Uint16Array);
  layer.phase = unpack(layer.phase, Uint8Array);
  layer.quantiles = unpack(layer.quantiles, Uint16Array);
  layer.spectrum = unpack(layer.spectrum, Uint32Array);
}

// Figures

function octaves(code) {
  const [low, high] = data.scale;
  return low + (code / (INFINITE - 1)) * (high - low);
}

function sayLife(life) {
  if (life === "∞" || life === Infinity) return "∞";
  if (life >= 9950) return Math.round(Number(life.toPrecision(2))).toLocaleString("en");
  return life >= 99.5 ? String(Math.round(life)) : life >= 0.995 ? life.toPrecision(2) : life.toFixed(2);
}

const lifeOf = (code) => (code === INFINITE ? Infinity : 2 ** octaves(code));
const phaseOf = (code) => (code === 0 ? Math.PI : (code / 256) * 2 * Math.PI - Math.PI);
const percent = (share) => `${(100 * share).toFixed(1)} %`;

function seriesOf(layer, head) {
  return head < 0 ? layer.quantiles.subarray((head + 5) * T, (head + 6) * T) : layer.life.subarray(head * T, (head + 1) * T);
}

// Colours: viridis, and a circle of hues for phases.

const VIRIDIS = [[68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141], [39, 173, 129], [92, 200, 99],
  [170, 220, 50], [253, 231, 37]];

function viridis(share) {
  const place = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1), n = Math.min(Math.floor(place), VIRIDIS.length - 2);
  return VIRIDIS[n].map((value, i) => Math.round(value + (place - n) * (VIRIDIS[n + 1][i] - value)));
}

function hue(share) {
  const wave = (shift) => Math.round(150 + 90 * Math.cos(2 * Math.PI * (share - shift)));
  return [wave(0), wave(1 / 3), wave(2 / 3)];
}

function rangeOf(codes) {
  const ended = Array.from(codes).filter((code) => code !== INFINITE).sort((a, b) => a - b);
  if (!ended.length) return [INFINITE - 1, INFINITE];
  const at = (share) => ended[Math.round(share * (ended.length - 1))];
  const low = at(0.02), high = at(0.98);
  return high > low ? [low, high] : [low, low + 1];
}

function scaled(code, [low, high]) {
  return code === INFINITE ? 1 : (code - low) / (high - low);
}

// The ends of a range in words; "∞" where all is infinite.
function sayRange([low, high]) {
  return low === INFINITE - 1 ? ["∞", "∞"] : [low, high].map((code) => sayLife(lifeOf(code)));
}

function readable([red, green, blue]) {
  return 0.299 * red + 0.587 * green + 0.114 * blue > 140 ? "#000000" : "#ffffff";
}

// Pieces of the page

function tableOf(caption, head, rows) {
  return make("table", {}, make("caption", {}, caption),
    make("thead", {}, make("tr", {}, ...head.map((cell) => make("th", { scope: "col" }, cell)))), make("tbody", {}, ...rows));
}

function circle(x, y, r, options) {
  return vector("circle", { cx: x, cy: y, r, ...options });
}

function axes() {
  const quiet = { stroke: "currentColor", "stroke-opacity": 0.4, "stroke-width": 0.008, fill: "none" };
  return [circle(0, 0, 1, quiet), vector("path", { d: "M-1 0H1M0-1V1", ...quiet })];
}

// Tables and spectra

function writeResets() {
  const names = [...new Set(gated.flatMap((layer) => Object.keys(layer.by_class)))];
  byId("resets").append(make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "characters"), make("th", { scope: "col" }, "tokens"),
    ...gated.map((layer) => make("th", { scope: "col" }, `layer ${layer.layer}`)))));
  const body = make("tbody");
  for (const name of names) {
    const row = make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, String(gated[0].by_class[name].tokens)));
    for (const layer of gated) {
      const found = layer.by_class[name], strength = found.ratio ? Math.min(Math.abs(Math.log2(found.ratio)), 2) / 2 : 0;
      const colour = found.ratio > 1 ? "--more" : "--less";
      row.append(make("td", { style: { background: `rgba(var(${colour}), ${(0.55 * strength).toFixed(2)})` } },
        found.ratio === null ? "–" : `×${found.ratio.toFixed(2)}`, make("small", {}, sayLife(found.half_life))));
    }
    body.append(row);
  }
  byId("resets").append(body);
  if (!gated.length) byId("resets").replaceWith(make("p", {}, "No layer has gates."));
}

function writeSpectra() {
  for (const layer of gated) {
    const cells = data.cells, canvas = make("canvas", { width: cells, height: cells, "aria-hidden": "true" });
    const image = new ImageData(cells, cells), most = Math.log1p(Math.max(...layer.spectrum));
    layer.spectrum.forEach((count, place) => {
      const row = cells - 1 - Math.floor(place / cells);
      if (count) image.data.set([...viridis(Math.log1p(count) / most), 255], 4 * (row * cells + (place % cells)));
    });
    canvas.getContext("2d").putImageData(image, 0, 0);
    const picture = vector("svg", { viewBox: "-1 -1 2 2", "aria-hidden": "true" });
    picture.append(...axes());
    const most_share = Math.max(...layer.half_lives.map((row) => row.share));
    const bars = layer.half_lives.map((row) => make("div", {
      style: { height: `${(100 * row.share) / most_share}%` },
      title: row.from === "∞" ? `∞: ${percent(row.share)}` : `${sayLife(row.from)} to ${sayLife(row.to)} tokens: ${percent(row.share)}`,
    }));
    const ends = [layer.half_lives[0].from, layer.half_lives[layer.half_lives.length - 1].to];
    byId("spectra").append(make("figure", {},
      make("figcaption", {}, make("strong", {}, `Layer ${layer.layer}`), `: ${layer.mixer}`),
      make("div", { class: "plane" }, canvas, picture),
      make("div", { class: "lives", role: "img", "aria-label": "shares of half-lives" }, ...bars),
      make("div", { class: "lives-axis" }, make("span", {}, sayLife(ends[0])), make("span", {}, "half-life, tokens"), make("span", {}, sayLife(ends[1])))));
  }
  if (!gated.length) byId("spectra").append(make("p", {}, "No layer has gates."));
}

function spanOf(row) {
  if (row.from === null) return "never";
  return row.from === row.to ? String(row.from) : `${row.from} – ${row.to}`;
}

function costs(row, extra = []) {
  const track = make("span", { class: "track" }, make("span", { class: "bar", style: { width: `${5 * row.accuracy}rem` } }));
  const cells = [spanOf(row), String(row.tokens), row.loss.toFixed(2), row.bits_per_byte?.toFixed(2) ?? "–", percent(row.accuracy), ...extra, track];
  return make("tr", {}, ...cells.map((cell) => make("td", {}, cell)));
}

function writeRecall() {
  const head = ["tokens", "nats/token", "bits/byte", "right"];
  byId("by-position").replaceWith(tableOf("By how many tokens it has read", ["read before", ...head, ""], data.by_position.map((row) => costs(row))));
  byId("by-distance").replaceWith(tableOf(`By how many tokens ago the same ${data.same_tokens} tokens stood before one`,
    ["ago", ...head, "again", ""], data.by_distance.map((row) => costs(row, [percent(row.again)]))));
  byId("recall-hint").textContent = "“right” is the share of tokens that the model thought likeliest. “again” is the share that were what had " +
    "followed the same tokens the last time: what copying alone would get right. Few tokens make uncertain shares.";
}

"use strict";

// The text, the token that is looked at, and the hands; page.figures.js comes before this.

// layer and head are places in `gated` and in the layer's shown heads; a head below 0 is a quantile over all heads.
const view = { layer: 0, what: gated.length ? "life" : "loss", head: -3, pinned: 0, hovered: null };

// Tokens

const VISIBLE = { "\n": "↵", "\t": "→", " ": "·" };

function visible(text) {
  const shown = Array.from(text, (character) => {
    if (character in VISIBLE) return VISIBLE[character];
    const code = character.codePointAt(0);
    // Whatever has no shape, or turns text around, is told by its number.
    if (/[\p{C}\p{Z}]/u.test(character)) return `U+${code.toString(16).toUpperCase().padStart(4, "0")}`;
    return character;
  }).join("");
  return /^\p{M}/u.test(shown) ? `◌${shown}` : shown;
}

const nameOf = (n) => (Array.isArray(data.text[n]) ? data.text[n][0] : visible(data.text[n]));
const tokens = [];

function makeToken(n) {
  const text = data.text[n], hex = Array.isArray(text);
  const token = make("span", { class: hex ? "token hex" : "token", role: "button", tabindex: n ? -1 : 0, "data-n": n });
  if (hex) token.append(text[0]);
  else if (/^\s+$/u.test(text)) token.append(make("span", { class: "mark" }, visible(text)));
  else token.append(visible(text));
  tokens.push(token);
  return token;
}

function writeText() {
  const starts = new Map(data.joined.map(([first, last, text]) => [first, [last, text]]));
  const place = byId("text");
  for (let n = 0; n < T; n++) {
    if (starts.has(n)) {
      const [last, text] = starts.get(n);
      const group = make("span", { class: "joined", "data-text": visible(text) });
      for (; n <= last; n++) group.append(makeToken(n));
      n--;
      place.append(group);
    } else place.append(makeToken(n));
    if (typeof data.text[n] === "string" && data.text[n].includes("\n")) place.append(make("br"));
    // Lines may break between tokens.
    else place.append("\u200b");
  }
}

// What is shown of the chosen layer

function colours() {
  const layer = gated[view.layer];
  if (view.what === "loss") {
    const losses = data.nats.map((nats) => nats ?? 0), most = Math.max(...losses, 0.1);
    return { low: "0", high: `${most.toFixed(1)} nats`, scale: viridis, of: (n) => (n ? viridis(losses[n] / most) : null),
      say: (n) => (n ? `loss ${losses[n].toFixed(2)} nats` : "not predicted") };
  }
  if (view.what === "phase") {
    const row = view.head * T;
    return { low: "−π", high: "π", scale: hue, of: (n) => hue(layer.phase[row + n] / 256),
      say: (n) => `phase ${phaseOf(layer.phase[row + n]).toFixed(2)}` };
  }
  const series = seriesOf(layer, view.head), range = rangeOf(series);
  const [low, high] = sayRange(range);
  return { low, high: `${high} tokens`, scale: viridis, of: (n) => viridis(scaled(series[n], range)),
    say: (n) => `half-life ${sayLife(lifeOf(series[n]))} tokens` };
}

function fillHeads() {
  const layer = gated[view.layer], select = byId("head");
  select.replaceChildren();
  byId("head-label").hidden = view.what === "loss";
  if (!layer || view.what === "loss") return;
  if (view.what === "life")
    QUANTILES.forEach((name, n) => select.append(make("option", { value: n - 5 }, `${name} of all ${layer.heads} heads`)));
  const medians = new Map(layer.heads_by_half_life.map((row) => [row.head, row.half_life]));
  layer.shown.forEach((head, n) =>
    select.append(make("option", { value: n }, `head ${head} (median ${sayLife(medians.get(head))} tokens)`)));
  if (view.head >= layer.shown.length || (view.what === "phase" && view.head < 0)) view.head = 0;
  select.value = view.head;
}

function paintLegend(now) {
  const canvas = byId("legend-scale"), context = canvas.getContext("2d");
  for (let n = 0; n < 256; n++) {
    context.fillStyle = `rgb(${now.scale(n / 255)})`;
    context.fillRect(n, 0, 1, 1);
  }
  byId("legend-low").textContent = now.low;
  byId("legend-high").textContent = now.high;
  byId("legend-note").textContent = view.what === "phase" ? "radians that the state turns by at each token" :
    view.what === "life" ? "half-life, logarithmic; beyond these ends the colour stays" : "";
}

function paint() {
  const layer = gated[view.layer];
  fillHeads();
  const now = colours();
  tokens.forEach((token, n) => {
    const colour = now.of(n);
    token.style.background = colour ? `rgb(${colour})` : "";
    token.style.color = colour ? readable(colour) : "";
    token.setAttribute("aria-label", `token ${n + 1}: ${nameOf(n)}, ${now.say(n)}`);
  });
  paintLegend(now);
  byId("map-block").hidden = !layer;
  const others = data.layers.filter((each) => !each.heads).map((each) => `Layer ${each.layer}: ${each.mixer}: ${each.note}.`);
  const own = layer ? [`Layer ${layer.layer}: ${layer.mixer}${layer.note ? `: ${layer.note}` : ""}.`] : [];
  byId("layer-note").textContent = [...own, ...others].join(" ");
  if (layer) paintMap(layer);
  show();
}

function paintMap(layer) {
  const canvas = byId("map"), heads = layer.shown.length, turns = view.what === "phase";
  canvas.width = T;
  canvas.height = heads;
  canvas.style.height = `${Math.min(Math.max(heads * 14, 60), 340)}px`;
  const image = new ImageData(T, heads), range = rangeOf(layer.life);
  for (let n = 0; n < T * heads; n++) {
    const colour = turns ? hue(layer.phase[n] / 256) : viridis(scaled(layer.life[n], range));
    image.data.set([...colour, 255], 4 * n);
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
  const all = heads === layer.heads ? `${heads} heads` : `${heads} of ${layer.heads} heads, evenly through their order`;
  byId("map-hint").textContent = `Tokens from left to right, ${all} from top to bottom, those that forget fastest at the top. ` +
    (turns ? "Phase." : `Half-life, from ${sayRange(range).join(" to ")} tokens.`);
}

// The token that is looked at

function show() {
  const n = view.hovered ?? view.pinned, layer = gated[view.layer];
  tokens.forEach((token, m) => token.classList.toggle("here", m === n));
  Object.assign(byId("map-mark").style, { left: `${(100 * n) / T}%`, width: `${100 / T}%` });
  const text = data.text[n], hex = Array.isArray(text) ? text[0] :
    Array.from(new TextEncoder().encode(text), (byte) => byte.toString(16).toUpperCase().padStart(2, "0")).join(" ");
  const place = byId("details");
  place.replaceChildren(make("h3", {}, nameOf(n)), make("p", { class: "hint" }, `token ${n + 1} of ${T}, bytes ${hex}` +
    (data.nats[n] === null ? ", not predicted" : `, loss ${data.nats[n].toFixed(2)} nats, ` +
    (data.right[n] ? "the likeliest" : "not the likeliest"))));
  if (!layer) return;
  const rows = gated.map((each, m) => {
    const life = (at) => sayLife(lifeOf(each.quantiles[at * T + n]));
    return make("tr", { class: m === view.layer ? "here" : "" }, ...[String(each.layer), life(0), life(2), life(4)].map((cell) => make("td", {}, cell)));
  });
  place.append(tableOf("Half-lives over the heads, in tokens", ["layer", "5 %", "median", "95 %"], rows));
  place.append(planeOf(layer, n), headsOf(layer, n));
}

function planeOf(layer, n) {
  const picture = vector("svg", { viewBox: "-1.1 -1.1 2.2 2.2", role: "img" });
  picture.setAttribute("aria-label", `gates of layer ${layer.layer} in the complex plane`);
  picture.append(...axes());
  layer.shown.forEach((head, row) => {
    const size = 0.5 ** (1 / lifeOf(layer.life[row * T + n])), turn = phaseOf(layer.phase[row * T + n]);
    const here = row === view.head;
    const dot = circle(size * Math.cos(turn), -size * Math.sin(turn), here ? 0.07 : 0.045,
      { fill: here ? "var(--ink)" : "var(--accent)", "fill-opacity": layer.shown.length > 40 && !here ? 0.45 : 0.85 });
    dot.append(vector("title", {}));
    dot.firstChild.textContent = `head ${head}`;
    picture.append(dot);
  });
  return picture;
}

function headsOf(layer, n) {
  const rows = layer.shown.map((head, row) => {
    const cells = [String(head), sayLife(lifeOf(layer.life[row * T + n])), phaseOf(layer.phase[row * T + n]).toFixed(2)];
    return make("tr", { class: row === view.head ? "here" : "" }, ...cells.map((cell) => make("td", {}, cell)));
  });
  const heading = `Layer ${layer.layer}, heads by their median half-life`;
  return make("div", { class: "list", tabindex: 0, role: "group", "aria-label": heading },
    tableOf(heading, ["head", "half-life", "phase"], rows));
}

// Hands

function go(n, focus) {
  view.pinned = Math.min(Math.max(n, 0), T - 1);
  view.hovered = null;
  tokens.forEach((token, m) => token.setAttribute("tabindex", m === view.pinned ? 0 : -1));
  const panel = byId("text").getBoundingClientRect(), box = tokens[view.pinned].getBoundingClientRect();
  if (box.top < panel.top || box.bottom > panel.bottom) byId("text").scrollTop += box.top - panel.top - panel.height / 2;
  if (focus) tokens[view.pinned].focus({ preventScroll: true });
  show();
}

function nextLine(n, way) {
  const own = tokens[n].getBoundingClientRect();
  let best = null, line = null;
  for (let m = n + way; m >= 0 && m < T; m += way) {
    const box = tokens[m].getBoundingClientRect();
    if (way * (box.top - own.top) <= own.height / 2) continue;
    line ??= box.top;
    if (Math.abs(box.top - line) > own.height / 2) break;
    const away = Math.abs(box.left - own.left);
    if (best === null || away < best.away) best = { m, away };
  }
  return best === null ? n : best.m;
}

function listen() {
  const text = byId("text"), map = byId("map");
  const at = (event) => event.target.closest?.(".token")?.dataset.n;
  text.addEventListener("pointerover", (event) => {
    if (at(event) === undefined || event.pointerType === "touch") return;
    view.hovered = Number(at(event));
    show();
  });
  text.addEventListener("pointerleave", () => { view.hovered = null; show(); });
  text.addEventListener("click", (event) => at(event) !== undefined && go(Number(at(event)), true));
  text.addEventListener("focusin", (event) => at(event) !== undefined && go(Number(at(event)), false));
  text.addEventListener("keydown", (event) => {
    const n = view.pinned, last = T - 1;
    const to = { ArrowLeft: () => n - 1, ArrowRight: () => n + 1, ArrowUp: () => nextLine(n, -1), ArrowDown: () => nextLine(n, 1),
      Home: () => 0, End: () => last, PageUp: () => n - 50, PageDown: () => n + 50 }[event.key];
    if (!to || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    go(to(), true);
  });
  const column = (event) => Math.min(T - 1, Math.max(0, Math.floor((T * event.offsetX) / map.clientWidth)));
  map.addEventListener("pointermove", (event) => { view.hovered = column(event); show(); });
  map.addEventListener("pointerleave", () => { view.hovered = null; show(); });
  map.addEventListener("click", (event) => {
    const heads = gated[view.layer].shown.length;
    if (view.what !== "loss") view.head = Math.min(heads - 1, Math.max(0, Math.floor((heads * event.offsetY) / map.clientHeight)));
    go(column(event), false);
    paint();
  });
  byId("layer").addEventListener("change", (event) => { view.layer = Number(event.target.value); view.head = view.what === "phase" ? 0 : -3; paint(); });
  byId("what").addEventListener("change", (event) => { view.what = event.target.value; view.head = view.what === "life" ? -3 : 0; paint(); });
  byId("head").addEventListener("change", (event) => { view.head = Number(event.target.value); paint(); });
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
}

function start() {
  byId("facts").textContent = `${T} tokens, ${data.bytes} bytes · ${data.bits_per_byte.toFixed(3)} bits per byte, ` +
    `${data.loss.toFixed(3)} nats per token · ${percent(data.accuracy)} of the tokens predicted right · ${data.layers.length} layers`;
  byId("notes").append(...data.notes.map((note) => make("li", {}, note)));
  gated.forEach((layer, n) => byId("layer").append(make("option", { value: n }, `${layer.layer}: ${layer.mixer}`)));
  if (!gated.length) {
    byId("what").replaceChildren(make("option", { value: "loss" }, "loss of the prediction"));
    byId("layer").closest("label").hidden = true;
  }
  writeText();
  writeResets();
  writeSpectra();
  writeRecall();
  listen();
  paint();
}

start();

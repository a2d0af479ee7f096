// The page: asks /v1/completions and shows what comes. Text of the model only ever becomes text, never markup.

const $ = (id) => document.getElementById(id);
const STEPS = 8; // of the scale from few layers to all
const PANELS = [0, 1].map((side) => new Panel($(`panel-${side}`)));
let model = null;
let going = null; // the AbortController of what is being asked

const HINT = () => "Point at a token, or go to it with the arrow keys, to see which layers ran" +
  (model.late_layers.length ? " and how the late layers voted." : ".");

function make(kind, className, text) {
  const node = document.createElement(kind);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function number(value, digits = 0) {
  return value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

function flops(value) {
  const units = ["", "k", "M", "G", "T", "P"];
  let power = 0;
  while (value >= 1000 && power < units.length - 1) [value, power] = [value / 1000, power + 1];
  return `${value.toPrecision(3)} ${units[power]}FLOP`;
}

function layersOf(value) {
  return number(value, Number.isInteger(value) ? 0 : 1);
}

// Signs that cannot be seen, or would act on the text around them, are spelt out; a line's end keeps ending the line.
function visible(text) {
  return text.replace(/\r/g, "␍").replace(/\n/g, "↵\n")
    .replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g,
      (sign) => `<U+${sign.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}>`);
}

function Panel(section) {
  const [heading, stats, text, token] =
    ["h2", ".stats", ".text", ".token"].map((part) => section.querySelector(part));
  let tokens, spans, here;

  this.begin = (title, prompt) => {
    [tokens, spans, here] = [[], [], -1];
    heading.textContent = title;
    stats.textContent = "waiting for its turn ...";
    token.replaceChildren(make("span", "sub", HINT()));
    text.replaceChildren(make("span", "prompt", prompt));
    text.classList.add("waiting");
  };

  this.add = (piece, details) => {
    const level = Math.round((details.layers / model.layers) * STEPS);
    const span = make("span", `t l${level}`, visible(piece));
    if (!piece) span.textContent = details.piece.includes("<0x") ? "▫" : "∎"; // a part of a character, or the end
    span.append(make("sup", "", layersOf(details.layers)));
    const place = tokens.length;
    span.addEventListener("pointerenter", () => this.show(place));
    span.addEventListener("click", () => this.show(place));
    const atEnd = text.scrollHeight - text.scrollTop - text.clientHeight < 40;
    text.append(span);
    if (atEnd) text.scrollTop = text.scrollHeight;
    tokens.push({ ...details, text: piece });
    spans.push(span);
    this.sum();
  };

  this.rest = (piece) => { if (piece) text.append(make("span", "", visible(piece))); };

  this.sum = () => {
    if (!tokens.length) return;
    const total = (name) => tokens.reduce((sum, one) => sum + one[name], 0);
    const seconds = tokens.at(-1).seconds;
    const [spent, dense] = [total("flops"), total("dense_flops")];
    const speed = seconds > 0 ? `${number(tokens.length / seconds, 1)} tokens/s` : "";
    stats.textContent = `${tokens.length} tokens, ${speed}; layers a token: ` +
      `${number(total("layers") / tokens.length, 2)} of ${model.layers}; ` +
      `${flops(spent)}, prompt included: ${number((100 * spent) / dense, 1)}% of those without routers`;
  };

  this.end = (told) => {
    text.classList.remove("waiting");
    if (told) stats.textContent = tokens.length ? `${stats.textContent}; ${told}` : told;
  };

  this.show = (place) => {
    if (place < 0 || place >= tokens.length) return;
    spans[here]?.classList.remove("here");
    here = place;
    spans[here].classList.add("here");
    spans[here].scrollIntoView({ block: "nearest" });
    token.replaceChildren(...described(tokens[here], place));
  };

  text.addEventListener("keydown", (event) => {
    const to = { ArrowRight: here + 1, ArrowLeft: Math.max(here - 1, 0), Home: 0, End: tokens?.length - 1 }[event.key];
    if (to === undefined || event.ctrlKey || event.altKey || event.metaKey || !tokens) return;
    event.preventDefault();
    this.show(Math.min(to, tokens.length - 1));
  });
  text.addEventListener("focus", () => { if (here < 0 && tokens?.length) this.show(0); });
}

function described(token, place) {
  const head = make("div");
  head.append(`${place + 1}: `, make("span", "piece", JSON.stringify(token.text || token.piece)),
    `, ${layersOf(token.layers)} of ${model.layers} layers, ${flops(token.flops)}`);
  const ran = make("div", "ran");
  ran.setAttribute("role", "img");
  ran.setAttribute("aria-label", `layers that ran: ${token.ran.flatMap((share, layer) => share ? [layer] : []).join(", ")}`);
  token.ran.forEach((share, layer) => {
    const box = make("span", share === 1 ? "on" : share ? "half" : "off", layer);
    const how = share === 1 ? "ran" : share ? `${share} of it ran` : "was skipped";
    box.title = `layer ${layer} ${how}${model.routed_layers.includes(layer) ? "" : " (it has no router)"}`;
    ran.append(box);
  });
  return token.votes.length ? [head, ran, votes(token.votes)] : [head, ran];
}

function votes(all) {
  const table = make("table");
  const row = table.createTHead().insertRow();
  for (const title of ["late layer", "weight", "", "alone it would say"]) row.append(make("th", "", title));
  const body = table.createTBody();
  for (const vote of all) {
    const line = body.insertRow();
    line.append(make("th", "", vote.layer), make("td", "", number(vote.weight, 3)));
    const bar = make("td", "bar");
    const fill = make("span");
    fill.style.width = `${100 * vote.weight}%`;
    bar.append(fill);
    const says = make("td", "says", `${JSON.stringify(vote.says.replaceAll("▁", " "))} ${number(100 * vote.probability)}%`);
    line.append(bar, says);
  }
  return table;
}

async function ask(panel, body, signal) {
  const answer = await fetch("/v1/completions", {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal,
  });
  if (!answer.ok) throw new Error(await refusal(answer));
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the server broke off; its output says why");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const content = event.replace(/^data: /, "");
      if (content === "[DONE]") return;
      const chunk = JSON.parse(content);
      if (chunk.error) throw new Error(chunk.error.message);
      const choice = chunk.choices[0];
      const details = choice.details.tokens[0];
      if (details) panel.add(choice.text, details);
      else panel.rest(choice.text);
    }
  }
}

async function refusal(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `the server answered ${answer.status}`;
  }
}

function request(side) {
  const body = { prompt: $("prompt").value, stream: true, details: true };
  for (const field of ["max_tokens", "temperature", "top_p", "seed"]) {
    const value = $(field).value.trim();
    if (value) body[field] = Number(value);
  }
  const density = densityOf(side);
  return density === null ? body : { ...body, density };
}

function densityOf(side) {
  if (!model.densities || (side === 0 && $("as-trained").checked)) return null;
  return Number($(`density-${side}`).value);
}

function titleOf(side) {
  const density = densityOf(side);
  if (density !== null) return `Density ${density.toFixed(2)}`;
  return model.density === null ? "Every layer" : `As trained (density ${model.density.toFixed(2)})`;
}

async function go(event) {
  event?.preventDefault();
  if (going || !model || !$("form").reportValidity()) return;
  going = new AbortController();
  [$("go").disabled, $("stop").disabled, $("error").hidden] = [true, false, true];
  const sides = $("compare").checked && model.densities ? [0, 1] : [0];
  $("panel-1").hidden = sides.length < 2;
  for (const side of sides) PANELS[side].begin(titleOf(side), $("prompt").value);
  for (const side of sides) { // one after the other, so that each has the machine to itself
    let told = "";
    try {
      if (going.signal.aborted) throw new DOMException("", "AbortError");
      await ask(PANELS[side], request(side), going.signal);
    } catch (error) {
      told = "stopped";
      if (error.name !== "AbortError") {
        const lost = error instanceof TypeError ? "the server does not answer; is it running?" : error.message;
        [$("error").textContent, $("error").hidden] = [lost, false];
        going.abort();
      }
    }
    PANELS[side].end(told);
  }
  going = null;
  [$("go").disabled, $("stop").disabled] = [false, true];
}

function showDial() {
  $("slider-1").hidden = !$("compare").checked;
  $("density-0").disabled = $("as-trained").checked;
  for (const side of [0, 1]) $(`shown-${side}`).textContent = densityOf(side)?.toFixed(2) ?? model.density.toFixed(2);
  for (const word of document.querySelectorAll(".side")) word.hidden = !$("compare").checked;
}

function setUp(found) {
  model = { ...found.details, id: found.id };
  $("name").textContent = model.id;
  document.title = `${model.id}: play`;
  const routed = model.routed_layers.length;
  $("facts").textContent = [
    `${model.layers} layers, ${routed ? `${routed} with a router` : "none with a router"}`,
    ...(model.density === null ? [] : [`density ${model.density.toFixed(3)} as trained`]),
    ...(model.late_layers.length ? [`layers ${model.late_layers.join(", ")} vote`] : []),
    ...(model.step === null ? [] : [`${number(model.step)} steps`]),
    `${number(model.positions)} positions`,
  ].join("; ");
  $("max_tokens").max = model.max_tokens;
  $("max_tokens").value = Math.min(80, model.max_tokens);
  [$("dials").hidden, $("no-dial").hidden, $("no-dial").textContent] = [!model.densities, !!model.densities, model.no_dial];
  if (model.densities) {
    const [least, most] = [Math.ceil(model.densities[0] * 100) / 100, Math.floor(model.densities[1] * 100) / 100];
    for (const side of [0, 1]) [$(`density-${side}`).min, $(`density-${side}`).max] = [least, most];
    [$("density-0").value, $("density-1").value] = [model.density.toFixed(2), most];
    showDial();
  }
  $("curl").textContent = `curl ${location.origin}/v1/completions -H 'content-type: application/json' ` +
    `-d '{"prompt": "It was", "max_tokens": 40${model.densities ? ', "density": 0.5' : ""}}'`;
  for (let level = 0; level <= STEPS; level++) $("scale").append(make("i", `l${level}`, layersOf(Math.round(level * model.layers / STEPS * 10) / 10)));
  $("legend").hidden = !routed;
}

$("form").addEventListener("submit", go);
$("stop").addEventListener("click", () => going?.abort());
$("numbers").addEventListener("change", () => document.body.classList.toggle("numbered", $("numbers").checked));
for (const id of ["as-trained", "compare", "density-0", "density-1"]) $(id).addEventListener("input", showDial);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") going?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) go(event);
});

try {
  const answer = await fetch("/v1/models");
  if (!answer.ok) throw new Error(await refusal(answer));
  setUp((await answer.json()).data[0]);
} catch (error) {
  [$("error").textContent, $("error").hidden] = [`the model cannot be asked: ${error.message}`, false];
}

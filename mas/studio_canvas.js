// The canvas of the studio, second part: undoing, keeping, what is to be seen, pointers and keys.

const KEY = "mas-studio-drawing"; // of the session: each tab has its own, and a reload keeps it
const MOST_UNDONE = 60;
const PAPER = [255, 255, 255];
const past = [];
const future = [];
let sent = null; // the value that Python has
let pointer = null; // [column, row] that the tool points at, for its outline

// Undoing, keeping, loading

const copy = (x) => ({ ...x, strokes: x.strokes.slice(), things: x.things.slice() });

function remember(old) {
  past.push(old);
  if (past.length > MOST_UNDONE) past.shift();
  future.length = 0;
  keep();
}

function travel(there, back, message) {
  cancel();
  if (!there.length) return say(`There is nothing to ${message}.`);
  back.push(state);
  state = there.pop();
  keep();
  draw();
}

const undo = () => travel(past, future, "undo");
const redo = () => travel(future, past, "do again");

const PLANES = ["labels", "edges", "strokes", "things"];
const toText = (plane) => btoa(Array.from(plane, (x) => String.fromCharCode(x)).join(""));
const toPlane = (text) => Uint8Array.from(atob(text), (x) => x.charCodeAt(0));

function keep() {
  const texts = PLANES.map((plane) => [plane, toText(state[plane])]);
  sent = JSON.stringify({ size, picture: state.picture, ...Object.fromEntries(texts) });
  props.value = sent;
  try {
    sessionStorage.setItem(KEY, sent);
  } catch {
    say("This browser does not keep the drawing over a reload: save the scene.");
  }
}

// The state that a value of `keep`, or of Python, tells of. That of another model is fitted.
function read(value) {
  const told = JSON.parse(value);
  const found = { ...blank(), picture: told.size === size ? (told.picture ?? null) : null };
  const nearest = (i) => Math.floor(((i + 0.5) * told.size) / size);
  for (const name of PLANES.filter((plane) => told[plane])) {
    const plane = toPlane(told[name]);
    if (plane.length !== told.size ** 2) throw new Error(`${name} has ${plane.length} pixels`);
    if (name !== "things" && plane.some((x) => x >= names.length && x < UNTOUCHED)) {
      throw new Error(`${name} has unknown classes`);
    }
    found[name] = found[name].map(
      (_, i) => plane[nearest(Math.floor(i / size)) * told.size + nearest(i % size)],
    );
  }
  return found;
}

function load(value) {
  const old = state;
  before = null;
  state = read(value);
  newThing();
  remember(old);
  draw();
  canvas.scrollIntoView({ block: "nearest" });
  say("The scene is on the canvas.");
}

function empty() {
  cancel();
  const old = state;
  state = blank();
  newThing();
  remember(old);
  draw();
  say("The canvas is empty.");
}

async function ask(name, value) {
  const unanswered = { error: "The studio does not answer; the drawing stays in this tab." };
  const answer = (await server[name](value).catch(() => null)) ?? unanswered;
  if (answer.error) say(answer.error);
  return answer.error ? null : answer;
}

async function save() {
  const answer = await ask("save_scene", sent);
  if (!answer) return;
  const link = document.createElement("a");
  link.href = `data:image/png;base64,${answer.png}`;
  link.download = "scene.png";
  link.click();
  say("Saved as scene.png.");
}

async function open(file) {
  if (file.size > props.largest) return say("This file is too large for a scene.");
  const url = await new Promise((resolve) => {
    const reader = new FileReader();
    reader.addEventListener("loadend", () => resolve(reader.result));
    reader.readAsDataURL(file);
  });
  if (url === null) return say("The browser cannot read this file; is it still there?");
  const answer = await ask("open_scene", url.slice(url.indexOf(",") + 1));
  if (!answer) return;
  load(answer.drawing);
  if (answer.warnings.length) say(answer.warnings.join(" "));
}

// What is to be seen

const rgb = props.palette.map((hex) => [1, 3, 5].map((k) => parseInt(hex.slice(k, k + 2), 16)));
const colour = (value) => (value === NOTHING ? PAPER : rgb[value]);
const describe = (i) => (label(i) === NOTHING ? "nothing, the model decides" : names[label(i)]);
const say = (message) => (find("[data-is=said]").textContent = message);

function draw() {
  const image = context.createImageData(size, size);
  const fill = (i, [red, green, blue]) => {
    image.data[4 * i] = red;
    image.data[4 * i + 1] = green;
    image.data[4 * i + 2] = blue;
    image.data[4 * i + 3] = 255;
  };
  for (let i = 0; i < size * size; i++) {
    const value = label(i);
    const apart = (j) => j < size * size && label(j) === value && !oneThing(i, j);
    const edge = value < stuff && (((i + 1) % size && apart(i + 1)) || apart(i + size));
    fill(i, edge ? PAPER : colour(value));
  }
  if (pointer && tool() === "stamp" && stamp) {
    eachOfStamp(pointer, (x, y, value) => {
      if (x >= 0 && y >= 0 && x < size && y < size) fill(y * size + x, colour(value));
    });
  }
  context.putImageData(image, 0, 0);
  if (pointer && !(tool() === "stamp" && stamp)) outline();
  find("[data-is=under]").textContent = pointer ? describe(pointer[1] * size + pointer[0]) : "";
}

function outline() {
  const round = tool() === "brush" || tool() === "eraser";
  context.beginPath();
  context.arc(pointer[0] + 0.5, pointer[1] + 0.5, round ? radius() : 1.5, 0, 2 * Math.PI);
  for (const [style, width] of [["#fff", 1.5], ["#000", 0.6]]) {
    context.strokeStyle = style;
    context.lineWidth = (width * size) / 128;
    context.stroke();
  }
}

// Pointers and keys

function place(event) {
  const area = canvas.getBoundingClientRect();
  return [
    Math.floor(((event.clientX - area.left) / area.width) * size),
    Math.floor(((event.clientY - area.top) / area.height) * size),
  ].map((x) => Math.min(size - 1, Math.max(0, x)));
}

canvas.addEventListener("pointerdown", (event) => {
  if (!event.isPrimary) return cancel(); // two fingers move the page
  if (event.button) return;
  event.preventDefault();
  canvas.focus({ preventScroll: true });
  canvas.setPointerCapture(event.pointerId);
  pointer = place(event);
  begin(pointer, event.altKey);
  draw();
});
canvas.addEventListener("pointermove", (event) => event.isPrimary && move(place(event)));
canvas.addEventListener("pointerup", (event) => event.isPrimary && finish());
canvas.addEventListener("pointercancel", cancel);
canvas.addEventListener("pointerleave", () => ((pointer = null), draw()));
canvas.addEventListener("focus", () => {
  if (canvas.matches(":focus-visible")) pointer ??= [size / 2, size / 2];
  draw();
});
canvas.addEventListener("blur", () => (finish(), (pointer = null), draw()));

function choose(group, value) {
  const choice = find(`input[name=${group}][value="${value}"]`);
  choice.checked = true;
  choice.scrollIntoView({ block: "nearest" });
  choice.dispatchEvent(new Event("change", { bubbles: true }));
}

function resize(by) {
  const slider = find(tool() === "stamp" ? "[data-is=scale]" : "[data-is=size]");
  slider.value = Number(slider.value) + by * Math.max(1, Math.round(Number(slider.max) / 40));
  slider.dispatchEvent(new Event("input"));
}

const chooser = find("[type=file]");
chooser.addEventListener("change", () => {
  if (chooser.files.length) open(chooser.files[0]);
  chooser.value = ""; // so that the same file may be opened again
});
canvas.addEventListener("dragover", (event) => event.preventDefault());
canvas.addEventListener("drop", (event) => {
  event.preventDefault();
  if (event.dataTransfer.files.length) open(event.dataTransfer.files[0]);
});

const ACTIONS = { undo, redo, flip, save, empty };
ACTIONS.open = () => chooser.click();
ACTIONS.thing = () => (newThing(), say("What is drawn next is another thing."));
ACTIONS.smaller = () => resize(-1);
ACTIONS.larger = () => resize(1);
ACTIONS.cancel = () => {
  if (!before && stamp) say("The stamp is put away.");
  if (!before) stamp = null;
  cancel();
};
const TOOLS = { b: "brush", e: "eraser", f: "fill", r: "rectangle", o: "ellipse" };
Object.assign(TOOLS, { s: "stamp", i: "pick" });
const KEYS = { n: "thing", x: "flip", "[": "smaller", "]": "larger", escape: "cancel" };
const CONTROL = { z: "undo", y: "redo", s: "save", o: "open" };
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function keyOnCanvas(event) {
  pointer ??= [size / 2, size / 2];
  if (event.key === " " || event.key === "Enter") {
    if (!before) begin(pointer, event.altKey);
    else finish();
    if (atOnce()) finish();
  } else if (event.key in ARROWS) {
    const step = event.shiftKey ? 1 : Math.round(size / grid / 2);
    const moved = pointer.map((x, axis) => x + ARROWS[event.key][axis] * step);
    move(moved.map((x) => Math.min(size - 1, Math.max(0, x))));
    say(describe(pointer[1] * size + pointer[0]));
  } else return false;
  draw();
  return true;
}

element.addEventListener("keydown", (event) => {
  if (event.target === search) return;
  const key = event.key.toLowerCase();
  const control = event.ctrlKey || event.metaKey;
  let done = true;
  if (control) {
    const action = key === "z" && event.shiftKey ? "redo" : CONTROL[key];
    if (action) ACTIONS[action]();
    else done = false;
  } else if (event.target === canvas && keyOnCanvas(event)) done = true;
  else if (event.altKey) done = false;
  else if (key in TOOLS) choose("tool", TOOLS[key]);
  else if (key in KEYS) ACTIONS[KEYS[key]]();
  else done = false;
  if (!done) return;
  event.preventDefault();
  draw();
});
element.addEventListener("click", (event) => {
  const action = event.target.closest("[data-do]")?.dataset.do;
  if (action) ACTIONS[action]();
  draw();
});
element.addEventListener("change", (event) => {
  if (event.target.name === "drawn") {
    if (!thing) newThing(); // no longer one of the scene below, that was picked
    find("[data-is=brush]").textContent = named(event.target.closest("label"));
  } else if (event.target.name === "tool") {
    finish();
    find("[data-is=stamping]").hidden = tool() !== "stamp";
    find("[data-is=brushing]").hidden = tool() !== "brush" && tool() !== "eraser";
    if (tool() === "stamp" && !stamp) say("Press on a thing to take a stamp of it.");
  }
  draw();
});
const search = find("[type=search]");
const classes = [...element.querySelectorAll("[data-is=classes] label")];
const named = (choice) => choice.textContent.trim();
search.addEventListener("input", () => {
  const wanted = search.value.trim().toLowerCase();
  for (const choice of classes) choice.hidden = !named(choice).toLowerCase().includes(wanted);
  find("[data-is=none]").hidden = classes.some((choice) => !choice.hidden);
});
search.addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  const wanted = search.value.trim().toLowerCase();
  const shown = classes.filter((choice) => !choice.hidden);
  const best = (test) => shown.find((choice) => test(named(choice).toLowerCase()));
  const found =
    best((name) => name === wanted) ?? best((name) => name.startsWith(wanted)) ?? best(() => true);
  if (!found) return;
  choose("drawn", found.control.value);
  search.value = "";
  search.dispatchEvent(new Event("input"));
  canvas.focus();
});

watch("value", () => {
  if (props.value && props.value !== sent) load(props.value);
});
try {
  const kept = sessionStorage.getItem(KEY);
  if (kept) state = read(kept);
} catch (error) {
  console.warn("the drawing of before the reload cannot be read", error);
}
newThing();
keep();
choose("drawn", props.classes[1]?.id ?? NOTHING);

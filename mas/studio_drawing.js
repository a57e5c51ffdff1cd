// The canvas of the studio, first part: what a drawing is, and what the tools make of it.
//
// Runs with studio_canvas.js as `js_on_load` of the gr.HTML that mas/studio_canvas.py builds:
// `element` is its root, `props` its values, `server` what it may ask Python. Drawn is at the size
// of the scene, one class id a pixel, on two planes: what was put there (`labels`, `edges`, its
// `picture`) and the strokes above it (`strokes`, and in `things` which of them are one thing).
// mas/drawing.py reads them.

const { size, grid, names, parts, stuff, untouched: UNTOUCHED, nothing: NOTHING } = props;

const find = (selector) => element.querySelector(selector);
const canvas = find("canvas");
const context = canvas.getContext("2d");
canvas.width = canvas.height = size;

let state = blank();
let before = null; // the state when the stroke began; null: no stroke
let from = null; // where the stroke was last
let begun = null; // where it began
let ink = NOTHING; // the class that it draws, or UNTOUCHED
let reach = 1; // its radius
let stamp = null; // {width, height, strokes}: a thing that was taken
let thing = 1; // number of what is drawn; things of one class with two numbers are parted

function blank() {
  const plane = (value) => new Uint8Array(size * size).fill(value);
  return {
    labels: plane(NOTHING),
    edges: plane(0),
    picture: null,
    strokes: plane(UNTOUCHED),
    things: plane(0),
  };
}

// What is where

const label = (i) => (state.strokes[i] === UNTOUCHED ? state.labels[i] : state.strokes[i]);
const number = (i) => (state.strokes[i] === UNTOUCHED ? 0 : state.things[i]);

// Whether an edge that was put there lies between pixel i and j, its right or lower neighbour,
// though both are of one class. Edges lie on the left or upper one; where that one borders on
// another class, too, the pixels beside it tell.
function edgeBetween(i, j) {
  const { labels, edges } = state;
  const alone = (k) =>
    edges[k] &&
    ((k + 1) % size === 0 || labels[k + 1] === labels[k]) &&
    (k + size >= size * size || labels[k + size] === labels[k]);
  const beside = j === i + 1 ? size : 1;
  return edges[i] && [i, i - beside, i + beside].some((k) => labels[k] === labels[i] && alone(k));
}

const oneThing = (i, j) =>
  label(i) === label(j) &&
  number(i) === number(j) &&
  (state.strokes[i] !== UNTOUCHED || state.strokes[j] !== UNTOUCHED || !edgeBetween(i, j));
const isPart = (i) => label(i) >= parts && label(i) !== NOTHING;
const oneFigure = (i, j) => oneThing(i, j) || (isPart(i) && isPart(j)); // people are made of parts

// All pixels that hang together with one; joined(i, j) tells of neighbours i < j.
function region(start, joined) {
  const found = [start];
  const inside = new Uint8Array(size * size);
  inside[start] = 1;
  const visit = (next, i, j) => {
    if (inside[next] || !joined(i, j)) return;
    inside[next] = 1;
    found.push(next);
  };
  for (let k = 0; k < found.length; k++) {
    const i = found[k];
    if (i % size) visit(i - 1, i - 1, i);
    if ((i + 1) % size) visit(i + 1, i, i + 1);
    if (i >= size) visit(i - size, i - size, i);
    if (i + size < size * size) visit(i + size, i, i + size);
  }
  return found;
}

// What the tools do

const tool = () => find("input[name=tool]:checked").value;
const brush = () => Number(find("input[name=drawn]:checked").value);
const radius = () => Number(find("[data-is=size]").value);

function put(x, y, value = ink) {
  if (x < 0 || y < 0 || x >= size || y >= size) return;
  state.strokes[y * size + x] = value;
  state.things[y * size + x] = value === UNTOUCHED ? 0 : thing;
}

function dab([column, row]) {
  for (let y = -reach; y <= reach; y++) {
    for (let x = -reach; x <= reach; x++) {
      if (x * x + y * y <= (reach - 0.5) ** 2) put(column + x, row + y);
    }
  }
}

function line(start, end) {
  const steps = Math.max(1, ...[0, 1].map((axis) => Math.abs(end[axis] - start[axis])));
  for (let k = 0; k <= steps; k++) {
    dab([0, 1].map((axis) => Math.round(start[axis] + ((end[axis] - start[axis]) * k) / steps)));
  }
}

function shape(start, end, round) {
  const [left, right] = [start[0], end[0]].sort((a, b) => a - b);
  const [top, bottom] = [start[1], end[1]].sort((a, b) => a - b);
  const [width, height] = [right - left + 1, bottom - top + 1];
  for (let y = top; y <= bottom; y++) {
    for (let x = left; x <= right; x++) {
      const across = (2 * (x - left) + 1) / width - 1;
      const down = (2 * (y - top) + 1) / height - 1;
      if (!round || across * across + down * down <= 1) put(x, y);
    }
  }
}

function takeStamp(i) {
  if (label(i) === NOTHING) return say("There is nothing to take: press on a thing.");
  const found = region(i, oneFigure);
  const [columns, rows] = [found.map((k) => k % size), found.map((k) => Math.floor(k / size))];
  const least = (values) => values.reduce((a, b) => Math.min(a, b));
  const most = (values) => values.reduce((a, b) => Math.max(a, b));
  const [left, top] = [least(columns), least(rows)];
  const [width, height] = [most(columns) - left + 1, most(rows) - top + 1];
  stamp = { width, height, strokes: new Uint8Array(width * height).fill(UNTOUCHED) };
  found.forEach((k, n) => (stamp.strokes[(rows[n] - top) * width + columns[n] - left] = label(k)));
  say(`A stamp of ${describe(i)}: press where it shall stand. Another one: Escape.`);
}

// Calls use(x, y, class) for each pixel of the stamp with its middle at a point.
function eachOfStamp([column, row], use) {
  const scale = Number(find("[data-is=scale]").value) / 100;
  const scaled = (side) => Math.max(1, Math.round(side * scale));
  const [width, height] = [scaled(stamp.width), scaled(stamp.height)];
  const [left, top] = [column - Math.floor(width / 2), row - Math.floor(height / 2)];
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const value =
        stamp.strokes[
          Math.floor(((y + 0.5) * stamp.height) / height) * stamp.width +
            Math.floor(((x + 0.5) * stamp.width) / width)
        ];
      if (value !== UNTOUCHED) use(left + x, top + y, value);
    }
  }
}

function flip() {
  if (!stamp) return say("There is no stamp yet: press on a thing with the stamp.");
  const { width, strokes } = stamp;
  stamp.strokes = strokes.map((_, i) => {
    const value = strokes[i - (i % width) + width - 1 - (i % width)];
    return value in props.mirrored ? props.mirrored[value] : value;
  });
  say("The stamp is flipped.");
}

function pick(i) {
  if (label(i) !== NOTHING && !find(`input[name=drawn][value="${label(i)}"]`)) {
    return say(`This model has not learned ${names[label(i)]}.`);
  }
  choose("drawn", label(i));
  thing = number(i);
  choose("tool", "brush");
  say(`The brush draws on at this: ${describe(i)}.`);
}

function newThing() {
  const used = new Set(state.things);
  thing = 1;
  while (used.has(thing) && thing < 255) thing++;
}

// A stroke from where the pointer is pressed to where it is let go; a second finger takes it back

const atOnce = () => tool() === "fill" || tool() === "stamp"; // all is done where it begins

function begin(point, picking) {
  const i = point[1] * size + point[0];
  if (picking || tool() === "pick") return pick(i);
  if (tool() === "stamp" && !stamp) return takeStamp(i);
  before = copy(state);
  from = begun = point;
  ink = tool() === "eraser" ? UNTOUCHED : brush();
  reach = radius();
  if (tool() === "fill") {
    for (const k of region(i, oneThing)) put(k % size, Math.floor(k / size));
  } else if (tool() === "stamp") {
    newThing();
    eachOfStamp(point, put);
  } else move(point);
}

function move(point) {
  if (before && !atOnce()) {
    if (tool() === "rectangle" || tool() === "ellipse") {
      state = copy(before);
      shape(begun, point, tool() === "ellipse");
    } else line(from, point);
    from = point;
  }
  pointer = point;
  draw();
}

function finish() {
  if (!before) return;
  const same = (plane) => before[plane].every((value, i) => value === state[plane][i]);
  if (!same("strokes") || !same("things")) remember(before);
  else if (tool() === "eraser") {
    say(`The eraser takes strokes away. To empty a part of the scene, draw "${props.emptying}".`);
  }
  before = null;
  draw();
}

function cancel() {
  if (!before) return;
  state = before;
  before = null;
  draw();
}

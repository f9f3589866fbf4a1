// The editing page's picture: strokes, boxes and drags become events of the session; what comes back is drawn.
const find = (query) => element.querySelector(query);
const all = (query) => [...element.querySelectorAll(query)];
const root = find(".editor"), canvas = find("canvas"), stage = find(".stage"), pen = canvas.getContext("2d");
const offers = props.offers;
const BLANK = [512, 512];
const HINTS = {
  compose: "Brush over an object to select it; drag it to move it, or out of the picture to remove it. "
    + "Keys: arrows move it, Enter puts it down, Delete removes it.",
  inpaint: "Draw a box where something is to appear, and say what. Everything else stays as it is.",
  create: "Describe a new picture, draw boxes on the empty canvas, and say what each holds.",
};
let view = props.value || null, tab = "", named = null, picture = null, tint = null, gesture = null, nudge = [0, 0], busy = 0;
const boxes = { inpaint: [], create: [] };

// ---------------------------------------------------------------- events

function send(event) {
  if (busy) return;
  busy = Date.now();
  root.classList.add("busy");
  say("Working ...");
  const shown = view ? { session: view.session, seen: view.version } : {};
  trigger("edit", { ...shown, ...event });
  const mine = busy;
  setTimeout(() => { if (busy === mine) { done(); say("The server has not answered; try again", true); } }, 120000);
}

function done() {
  busy = 0;
  root.classList.remove("busy");
}

function say(text, failed) {
  const status = find(".status");
  status.textContent = text;
  status.classList.toggle("failed", Boolean(failed));
}

async function open(file) {
  if (!file || busy) return;
  say("Sending the picture ...");
  try {
    const { path } = await upload(file);
    send({ op: "upload", file: path });
  } catch (error) {
    say("The picture could not be sent: " + (error && error.message || error), true);
  }
}

// ---------------------------------------------------------------- what is shown

function loaded(address) {
  return new Promise((resolve) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => resolve(null);
    image.src = address;
  });
}

const address = (number, small) => `/editing/${view.session}/${number}.png${small ? "?small=1" : ""}`;

async function show() {
  const now = props.value;
  if (!now) return;
  const before = view;
  view = now;
  nudge = [0, 0];
  const same = picture && before && before.session === now.session && before.version === now.version;
  const [image, mask] = await Promise.all([
    now.version === null ? null : same ? picture : loaded(address(now.version)),
    now.object ? loaded(now.object.tint) : null,
  ]);
  if (view !== now) return;
  picture = image;
  tint = mask;
  if (before && now.version !== before.version && now.versions.length) {
    const made = now.versions[now.version].op;
    if (made === "insert") boxes.inpaint = [];
    if (made === "create") { boxes.create = []; choose(offers.tabs[0].name); }
  }
  done();
  say(now.note, now.failed);
  controls();
  strip();
  rows();
  draw();
  root.dataset.view = now.view;
}

function controls() {
  const none = view.version === null;
  find("[data-do=undo]").disabled = !view.undo;
  find("[data-do=redo]").disabled = !view.redo;
  for (const link of all("[data-link]")) {
    link.setAttribute("aria-disabled", String(none));
    if (none) link.removeAttribute("href");
    else link.href = link.dataset.link === "picture" ? address(view.version) : `/editing/${view.session}/session.zip`;
  }
  find(".object").hidden = !view.object;
  find("[data-do=next]").hidden = !(named && view.object && view.object.count > 1);
  if (view.object) find("[name=dilation]").value = view.object.dilation;
}

function strip() {
  const list = find(".strip");
  list.replaceChildren(...view.versions.map((one) => {
    const button = document.createElement("button"), image = document.createElement("img"), item = document.createElement("li");
    button.type = "button";
    button.setAttribute("aria-current", String(one.number === view.version));
    button.setAttribute("aria-label", `Show picture ${one.number}: ${one.said.toLowerCase()}`
      + (one.parent === null ? "" : `, made of picture ${one.parent}`));
    button.title = button.getAttribute("aria-label");
    image.src = address(one.number, true);
    image.alt = "";
    button.append(image, `${one.number} ${one.op}`);
    button.onclick = () => send({ op: "show", version: one.number });
    item.append(button);
    return item;
  }));
  const current = list.querySelector("[aria-current=true]");
  if (current) list.scrollLeft = current.offsetLeft - list.clientWidth / 2;
}

function choose(name) {
  tab = name;
  root.dataset.tab = name;
  for (const button of all(".tabs button")) button.setAttribute("aria-selected", String(button.dataset.name === name));
  const chosen = offers.tabs.find((one) => one.name === name);
  find("[data-panel=compose]").classList.toggle("open", Boolean(chosen) && !chosen.draws);
  find("[data-panel=draw]").classList.toggle("open", Boolean(chosen) && chosen.draws);
  find("[data-panel=draw]").setAttribute("aria-label", chosen ? chosen.title : "");
  find(".prompt").hidden = !(chosen && chosen.caption);
  find("[data-do=draw]").textContent = name === "create" ? "Make the picture" : "Add";
  find(".hint").textContent = HINTS[name] || "";
  find(".about").textContent = (chosen && offers.notes[chosen.draws ? "generator" : "segmenter"]) || "";
  gesture = null;
  rows();
  draw();
}

// ---------------------------------------------------------------- the canvas

function size() {
  return tab === "create" ? BLANK : view && view.size ? view.size : [512, 384];
}

function fit() {
  const [width, height] = size();
  const scale = Math.min(stage.clientWidth / width, 0.58 * window.innerHeight / height);
  canvas.style.width = `${Math.max(1, Math.floor(width * scale))}px`;
  canvas.style.height = `${Math.max(1, Math.floor(height * scale))}px`;
}

function drawn(box, label, colour) {
  const [width, height] = size(), unit = width / (canvas.clientWidth || width);
  const [x0, y0, x1, y1] = [box[0] * width, box[1] * height, box[2] * width, box[3] * height];
  pen.lineWidth = 4 * unit;
  pen.strokeStyle = "white";
  pen.strokeRect(x0, y0, x1 - x0, y1 - y0);
  pen.lineWidth = 2 * unit;
  pen.strokeStyle = colour;
  pen.strokeRect(x0, y0, x1 - x0, y1 - y0);
  if (label) {
    pen.font = `${13 * unit}px system-ui, sans-serif`;
    pen.lineWidth = 3 * unit;
    pen.strokeStyle = "white";
    pen.strokeText(label, x0 + 5 * unit, y0 + 16 * unit);
    pen.fillStyle = colour;
    pen.fillText(label, x0 + 5 * unit, y0 + 16 * unit);
  }
}

function draw() {
  const [width, height] = size();
  const zoom = Math.max(1, Math.ceil(600 / width));  // lines on a small picture are finer than its pixels
  if (canvas.width !== zoom * width || canvas.height !== zoom * height) {
    [canvas.width, canvas.height] = [zoom * width, zoom * height];
  }
  pen.setTransform(zoom, 0, 0, zoom, 0, 0);
  pen.imageSmoothingEnabled = false;
  fit();
  pen.clearRect(0, 0, width, height);
  const blank = tab === "create" || !picture;
  pen.fillStyle = "#8a8a8a";
  if (blank) pen.fillRect(0, 0, width, height);
  else pen.drawImage(picture, 0, 0);
  if (tab === "compose" && view && view.object && tint) object();
  (boxes[tab] || []).forEach((one, number) => drawn(one.box, `${number + 1} ${one.phrase}`, "#0050d8"));
  if (gesture && gesture.kind === "box") drawn(rectangle(gesture.points), "", "#0050d8");
  if (gesture && gesture.kind === "stroke") {
    pen.strokeStyle = "rgba(255, 0, 170, .8)";
    pen.lineWidth = Math.max(2, 0.02 * Math.min(width, height));
    pen.lineCap = pen.lineJoin = "round";
    pen.beginPath();
    gesture.points.forEach(([x, y]) => pen.lineTo(x * width, y * height));
    if (gesture.points.length === 1) pen.lineTo(gesture.points[0][0] * width + 0.1, gesture.points[0][1] * height);
    pen.stroke();
  }
}

function object() {
  const [width, height] = size(), [dx, dy] = nudge;
  if (dx || dy) {  // its own pixels where it is being dragged
    const layer = new OffscreenCanvas(width, height), own = layer.getContext("2d");
    own.drawImage(tint, 0, 0);
    own.globalCompositeOperation = "source-in";
    own.drawImage(picture, 0, 0);
    pen.globalAlpha = 0.9;
    pen.drawImage(layer, dx, dy);
  }
  pen.globalAlpha = 0.3;
  pen.drawImage(tint, dx, dy);
  pen.globalAlpha = 1;
  const [x0, y0, x1, y1] = view.object.box;
  const unit = width / (canvas.clientWidth || width);
  pen.setLineDash([6 * unit, 4 * unit]);
  drawn([(x0 + dx) / width, (y0 + dy) / height, (x1 + 1 + dx) / width, (y1 + 1 + dy) / height], "", "#c00080");
  pen.setLineDash([]);
}

function hit([x, y]) {
  if (!view || !view.object || !tint) return false;
  const [width, height] = size(), probe = new OffscreenCanvas(1, 1).getContext("2d");
  probe.drawImage(tint, -Math.floor(x * width), -Math.floor(y * height));
  return probe.getImageData(0, 0, 1, 1).data[3] > 0;
}

const round = (value) => Math.round(Math.min(1, Math.max(0, value)) * 10000) / 10000;
const tool = () => (find("[name=tool]:checked") || {}).value || "box";

function place(event) {
  const box = canvas.getBoundingClientRect();
  return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
}

function rectangle([[a, b], [c, d]]) {
  return [round(Math.min(a, c)), round(Math.min(b, d)), round(Math.max(a, c)), round(Math.max(b, d))];
}

canvas.addEventListener("pointerdown", (event) => {
  if (busy || event.button || !tab || (tab !== "create" && !picture)) return;
  event.preventDefault();
  stage.focus({ preventScroll: true });
  canvas.setPointerCapture(event.pointerId);
  const at = place(event);
  const kind = tab !== "compose" ? "box" : hit(at) ? "drag" : tool();
  gesture = { kind, points: kind === "box" ? [at, at] : [at], id: event.pointerId };
  nudge = [0, 0];
  draw();
});

canvas.addEventListener("pointermove", (event) => {
  if (!gesture || gesture.id !== event.pointerId) return;
  const at = place(event), [width, height] = size();
  if (gesture.kind === "stroke") {
    if (gesture.points.length < 1000) gesture.points.push(at);
  } else if (gesture.kind === "box") gesture.points[1] = at;
  else nudge = [Math.round((at[0] - gesture.points[0][0]) * width), Math.round((at[1] - gesture.points[0][1]) * height)];
  draw();
});

canvas.addEventListener("pointerup", (event) => {
  if (!gesture || gesture.id !== event.pointerId) return;
  const { kind, points } = gesture, at = place(event);
  gesture = null;
  if (kind === "drag") {
    const out = at.some((value) => value < 0 || value > 1);
    if (out) send({ op: "remove" });
    else put();
  } else if (kind === "stroke") {
    send({ op: "segment", stroke: points.map(([x, y]) => [round(x), round(y)]) });
  } else {
    const box = rectangle(points);
    if (box[2] - box[0] >= 0.01 && box[3] - box[1] >= 0.01) {
      if (tab === "compose") send({ op: "segment", box });
      else { boxes[tab].push({ box, phrase: "" }); rows(boxes[tab].length - 1); }
    }
  }
  draw();
});

canvas.addEventListener("pointercancel", () => { gesture = null; nudge = [0, 0]; draw(); });

function put() {
  const [dx, dy] = nudge;
  if (dx || dy) send({ op: "place", dx, dy });
}

// ---------------------------------------------------------------- keys

root.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input[type=text], input[type=number]");
  if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z" && !typing) {
    event.preventDefault();
    if (event.shiftKey ? view && view.redo : view && view.undo) send({ op: event.shiftKey ? "redo" : "undo" });
    return;
  }
  if (event.target !== stage) return;
  if (event.key === "Escape") { gesture = null; nudge = [0, 0]; draw(); }
  if (tab !== "compose" || !view || !view.object || busy) return;
  const step = event.shiftKey ? 10 : 1;
  const by = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[event.key];
  if (by) {
    nudge = [nudge[0] + by[0], nudge[1] + by[1]];
    say(`Moved by ${nudge[0]} right, ${nudge[1]} down; Enter puts it down`);
    draw();
  } else if (event.key === "Enter") put();
  else if (event.key === "Delete") send({ op: "remove" });
  else return;
  event.preventDefault();
});

// ---------------------------------------------------------------- boxes and fields

function rows(focus) {
  const list = find(".boxes"), own = boxes[tab] || [];
  list.replaceChildren(...own.map((one, number) => {
    const item = document.createElement("li");
    const phrase = document.createElement("input");
    Object.assign(phrase, { type: "text", value: one.phrase, maxLength: 200, size: 16 });
    phrase.setAttribute("aria-label", `What box ${number + 1} holds`);
    phrase.placeholder = "a red disc";
    phrase.oninput = () => { one.phrase = phrase.value; draw(); };
    item.append(`${number + 1}`, phrase);
    ["left", "top", "right", "bottom"].forEach((edge, side) => {
      const field = document.createElement("input"), label = document.createElement("label");
      Object.assign(field, { type: "number", min: 0, max: 100, step: 0.1, value: (100 * one.box[side]).toFixed(1) });
      field.setAttribute("aria-label", `Box ${number + 1}, ${edge} edge in percent`);
      field.oninput = () => { one.box[side] = round(Number(field.value) / 100); draw(); };
      label.append(`${edge} `, field);
      item.append(label);
    });
    const away = document.createElement("button");
    away.type = "button";
    away.textContent = "Delete";
    away.setAttribute("aria-label", `Delete box ${number + 1}`);
    away.onclick = () => { own.splice(number, 1); rows(); draw(); };
    item.append(away);
    return item;
  }));
  find("[data-do=draw]").disabled = tab !== "create" && !own.length;
  if (focus !== undefined) list.children[focus].querySelector("input").focus({ preventScroll: true });
}

function name(text, pick) {
  named = { text, pick };
  send({ op: "segment", text, pick });
}

const actions = {
  next: () => name(named.text, named.pick % view.object.count + 1),
  box() { boxes[tab].push({ box: [0.35, 0.35, 0.65, 0.65], phrase: "" }); rows(boxes[tab].length - 1); draw(); },
  draw() {
    const own = boxes[tab], nameless = own.findIndex((one) => !one.phrase.trim());
    if (nameless >= 0) { say(`Say what box ${nameless + 1} holds`, true); rows(nameless); return; }
    const layout = { boxes: own.map((one) => one.box), phrases: own.map((one) => one.phrase.trim()) };
    send(tab === "create" ? { op: "create", prompt: find("[name=prompt]").value, ...layout } : { op: "insert", ...layout });
  },
};
for (const button of all("[data-do]")) {
  button.addEventListener("click", () => (actions[button.dataset.do] || (() => send({ op: button.dataset.do })))());
}
const number = (form, field) => Number(form.elements[field].value);
const forms = {
  name: (form) => name(form.elements.text.value, 1),
  mark(form, value) {
    const [x0, y0, x1, y1] = ["x0", "y0", "x1", "y1"].map((field) => round(number(form, field) / 100));
    send(value === "box" ? { op: "segment", box: [x0, y0, x1, y1] } : { op: "segment", stroke: [[x0, y0], [x1, y1]] });
  },
  move: (form) => send({ op: "place", dx: number(form, "dx"), dy: number(form, "dy") }),
  replace: (form) => send({ op: "generate", text: form.elements.text.value }),
  dilate: (form) => send({ op: "dilate", dilation: number(form, "dilation") }),
};
for (const form of all("form")) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    forms[form.dataset.form](form, event.submitter && event.submitter.value);
  });
}

const file = find(".file");
file.addEventListener("change", () => { open(file.files[0]); file.value = ""; });
root.addEventListener("dragover", (event) => event.preventDefault());
root.addEventListener("drop", (event) => { event.preventDefault(); open(event.dataTransfer.files[0]); });
root.addEventListener("paste", (event) => {
  const found = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
  if (found) { event.preventDefault(); open(found); }
});

// ---------------------------------------------------------------- what there is

for (const part of all("[data-mark]")) {
  part.hidden = !part.dataset.mark.split(",").some((mark) => offers.marks.includes(mark));
}
for (const part of all("[data-draws]")) part.hidden = !offers.draws;
const first = find("label[data-mark]:not([hidden]) [name=tool]");
if (first) first.checked = true;
find(".tabs").replaceChildren(...offers.tabs.map((one) => {
  const button = document.createElement("button");
  button.type = "button";
  button.setAttribute("role", "tab");
  button.dataset.name = one.name;
  button.textContent = one.title;
  button.onclick = () => choose(one.name);
  return button;
}));
find(".who ul").replaceChildren(...Object.values(offers.notes).map((text) => {
  const item = document.createElement("li");
  item.textContent = text;
  return item;
}));
new ResizeObserver(() => draw()).observe(stage);
choose(offers.tabs.length ? offers.tabs[0].name : "");
watch("value", show);
if (view) show();

"use strict";
// What a report's page does: tables that sort, curves that zoom. Names are a user's text: textContent, never innerHTML.

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function draw(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// ---------------------------------------------------------------------------------------------------- tables

const NUMBER = /^[+-]?\d+(\.\d+)?(e[+-]?\d+)?( ± .*| \(.*\))?~?$/;
const isBlank = text => text === "" || text === "-";

function sortable(table) {
  const headings = [...table.tHead.rows[0].cells];
  const original = [...table.tBodies[0].rows];
  headings.forEach((heading, column) => {
    const button = make("button", { type: "button" }, heading.textContent);
    heading.replaceChildren(button);
    heading.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const next = { none: "ascending", ascending: "descending", descending: "none" }[heading.getAttribute("aria-sort")];
      for (const other of headings) other.setAttribute("aria-sort", other === heading ? next : "none");
      table.tBodies[0].append(...(next === "none" ? original : sorted(original, column, next === "ascending" ? 1 : -1)));
    });
  });
}

// Rows by a column: as numbers where all its cells begin with one; cells without a value last in either direction.
function sorted(rows, column, sign) {
  const keyed = rows.map(row => ({ row, text: row.cells[column].textContent.trim() }));
  const known = keyed.filter(({ text }) => !isBlank(text));
  const numeric = known.every(({ text }) => NUMBER.test(text));
  const compare = numeric
    ? (a, b) => parseFloat(a.text) - parseFloat(b.text)
    : (a, b) => a.text.localeCompare(b.text, "en", { numeric: true });
  known.sort((a, b) => sign * compare(a, b));
  return [...known, ...keyed.filter(({ text }) => isBlank(text))].map(({ row }) => row);
}

document.querySelectorAll("table").forEach(sortable);

// ---------------------------------------------------------------------------------------------------- numbers

function short(value) {
  if (value === null) return "no number";
  const size = Math.abs(value);
  return size !== 0 && (size >= 1e6 || size < 1e-3) ? value.toExponential(2) : String(+value.toPrecision(4));
}

function linearTicks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 2.5, 5].find(factor => power * factor >= rough) ?? 10);
  const ticks = [];
  for (let i = Math.ceil(low / step); i * step <= high * (1 + 1e-12) && ticks.length < 50; i++) ticks.push(i * step);
  return ticks;
}

function logTicks(low, high) {
  const ticks = [], wide = Math.log10(high / low) > 3;
  for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power++)
    for (const factor of wide ? [1] : [1, 2, 5]) {
      const tick = factor * 10 ** power;
      if (tick >= low && tick <= high) ticks.push(tick);
    }
  const every = Math.ceil(ticks.length / 8);
  return ticks.length < 2 ? linearTicks(low, high, 5) : ticks.filter((_, i) => i % every === 0);
}

// Position of the element of `ordered` that is nearest to `value`.
function nearest(ordered, value) {
  let low = 0, high = ordered.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (ordered[middle] <= value) low = middle; else high = middle;
  }
  return value - ordered[low] <= ordered[high] - value ? low : high;
}

// ---------------------------------------------------------------------------------------------------- lines

const COLOURS = 7, DASHES = ["", "6 3", "2 2", "7 2 2 2"], MANY = 12, IN_TIP = 8, DOTS = 25;
const styleOf = index => ({ colour: `c${index % COLOURS}`, dash: DASHES[Math.floor(index / COLOURS) % DASHES.length] });

function swatch(index) {
  const { colour, dash } = styleOf(index);
  const line = draw("line", { x1: 0, y1: 5, x2: 26, y2: 5, "stroke-dasharray": dash, class: "line" });
  return draw("svg", { viewBox: "0 0 26 10", class: `swatch ${colour}`, "aria-hidden": "true" }, line);
}

// What is drawn: the tasks of a run, or every run at a task. A group is what an entry of the legend shows and hides.
function viewsOf(data) {
  const methods = [...new Set(data.runs.map(run => run.method))];
  const curve = (run, key, k) => run.curves[key]?.[k];
  const ofRuns = data.runs.map(run => ({
    title: run.name, groups: data.tasks,
    lines: key => data.tasks.map((task, k) => ({ name: task, group: k, curve: curve(run, key, k) })),
  }));
  const ofTasks = data.runs.length < 2 ? [] : data.tasks.map((task, k) => ({
    title: task, groups: methods,
    lines: key => data.runs.map(run => ({
      name: run.name, group: methods.indexOf(run.method), curve: curve(run, key, k),
    })),
  }));
  return { ofRuns, ofTasks };
}

// ---------------------------------------------------------------------------------------------------- a chart

const MARGIN = { left: 54, right: 20, top: 8, bottom: 36 };

class Chart {
  constructor(board, key, title) {
    Object.assign(this, { board, key, title, log: null, heights: null, lines: [] });
    this.check = make("input", { type: "checkbox" });
    this.check.addEventListener("change", () => { this.log = this.check.checked; this.heights = null; this.render(); });
    this.svg = draw("svg", { class: "axes", tabindex: 0, role: "img" });
    this.tip = make("div", { class: "tip", hidden: "" });
    const header = make("header", {}, make("h3", {}, title), make("label", {}, this.check, " logarithmic"));
    this.node = make("div", { class: "chart", "data-quantity": key }, header, this.svg, this.tip);
    this.listen();
  }

  listen() {
    const on = (name, act) => this.svg.addEventListener(name, act);
    on("pointerdown", event => {
      if (event.button !== 0) return;
      this.start = this.place(event);
      this.svg.setPointerCapture(event.pointerId);
    });
    on("pointermove", event => (this.start && event.buttons ? this.select(event) : this.look(event)));
    on("pointerup", event => { this.zoom(event); this.look(event); });
    on("pointercancel", () => { this.start = null; this.clear(); });
    on("pointerleave", () => this.clear());
    on("dblclick", () => this.board.reset());
    on("keydown", event => {
      const act = { "+": [0.5, 0], "=": [0.5, 0], "-": [2, 0], ArrowLeft: [1, -0.25], ArrowRight: [1, 0.25] }[event.key];
      if (event.key === "0" || event.key === "Escape") this.board.reset();
      else if (act) this.board.move(...act);
      else return;
      event.preventDefault();
    });
  }

  // Where a pointer is, in units of the drawing, within the axes.
  place(event) {
    const box = this.svg.getBoundingClientRect(), scale = this.width / box.width;
    const within = (value, low, high) => Math.min(Math.max(value, low), high);
    return {
      x: within((event.clientX - box.left) * scale, MARGIN.left, this.width - MARGIN.right),
      y: within((event.clientY - box.top) * scale, MARGIN.top, this.height - MARGIN.bottom),
    };
  }

  render() {
    const steps = this.board.data.steps;
    this.lines = this.board.view.lines(this.key)
      .filter(line => line.curve && this.board.isShown(line.group))
      .map(line => ({ ...line, steps: steps[line.curve[0]], values: line.curve[1] }));
    this.width = Math.max(this.node.clientWidth, 200);
    this.height = this.width < 420 ? 230 : 290;
    this.setScale();
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${this.height}`);
    this.svg.setAttribute("aria-label", this.description());
    this.overlay = draw("g");
    this.plot = this.drawLines();
    this.svg.replaceChildren(...this.drawAxes(), this.plot, this.overlay);
    this.tip.hidden = true;
  }

  description() {
    const [low, high] = this.span.map(step => short(Math.round(step)));
    return `${this.title}, ${this.lines.length} lines, steps ${low} to ${high}`;
  }

  // Steps and values that the axes show, and from them to places.
  setScale() {
    this.span = this.board.span ?? this.board.wholeSpan;
    const [from, to] = this.span;
    const known = this.lines.flatMap(line => line.values.filter(value => value !== null));
    const inside = this.lines.flatMap(line =>
      line.values.filter((value, i) => value !== null && line.steps[i] >= from && line.steps[i] <= to));
    const range = values => values.reduce(([low, high], v) => [Math.min(low, v), Math.max(high, v)], [Infinity, -Infinity]);
    const [lowest, highest] = range(known);
    const positive = lowest > 0 && known.length > 0;
    this.isLog = positive && (this.log ?? highest > 20 * lowest);
    this.check.checked = this.isLog;
    this.check.disabled = !positive;
    const bend = this.isLog ? Math.log10 : Number;
    let [low, high] = (this.heights ?? (known.length ? range(inside.length ? inside : known) : [0, 1])).map(bend);
    const pad = this.heights ? 0 : high > low ? 0.05 * (high - low) : 0.1 * Math.abs(low) || 1;
    [low, high] = [low - pad, high + pad];
    const wide = this.width - MARGIN.left - MARGIN.right, tall = this.height - MARGIN.top - MARGIN.bottom;
    this.x = step => MARGIN.left + wide * (step - from) / (to - from);
    this.y = value => MARGIN.top + tall * (high - bend(value)) / (high - low);
    this.stepAt = x => from + (to - from) * (x - MARGIN.left) / wide;
    this.valueAt = y => { const v = high - (high - low) * (y - MARGIN.top) / tall; return this.isLog ? 10 ** v : v; };
  }

  drawAxes() {
    const bottom = this.height - MARGIN.bottom, right = this.width - MARGIN.right;
    const [high, low] = [this.valueAt(MARGIN.top), this.valueAt(bottom)];
    const rows = (this.isLog ? logTicks(low, high) : linearTicks(low, high, 5)).flatMap(value => [
      draw("line", { class: "rule", x1: MARGIN.left, x2: right, y1: this.y(value), y2: this.y(value) }),
      draw("text", { x: MARGIN.left - 6, y: this.y(value) + 4, "text-anchor": "end" }, short(value)),
    ]);
    const columns = linearTicks(...this.span, this.width < 420 ? 3 : 5).map(step =>
      draw("text", { class: "step", x: this.x(step), y: bottom + 15, "text-anchor": "middle" }, short(step)));
    const name = draw("text", { x: (MARGIN.left + right) / 2, y: bottom + 31, "text-anchor": "middle" }, "step");
    return [...rows, ...columns, name];
  }

  drawLines() {
    // What leaves this frame is cut off; dots at its border are not.
    const frame = { x: MARGIN.left - 3, y: MARGIN.top - 3, width: this.width - MARGIN.left - MARGIN.right + 6 };
    frame.height = this.height - MARGIN.top - MARGIN.bottom + 6;
    const viewBox = `${frame.x} ${frame.y} ${frame.width} ${frame.height}`;
    const plot = draw("svg", { ...frame, viewBox, class: this.lines.length > MANY ? "many" : "" });
    for (const line of this.lines) {
      const { colour, dash } = styleOf(line.group);
      line.node = draw("g", { class: `line ${colour}`, "stroke-dasharray": dash }, ...this.shapes(line));
      plot.append(line.node);
    }
    return plot;
  }

  // A path with a gap at each value that is no number, and dots where points are few or stand alone.
  shapes({ steps, values }) {
    const dots = [], known = i => values[i] !== undefined && values[i] !== null;
    let path = "";
    values.forEach((value, i) => {
      if (value === null) return;
      const x = this.x(steps[i]).toFixed(1), y = this.y(value).toFixed(1);
      path += `${known(i - 1) ? "L" : "M"}${x} ${y}`;
      if (values.length <= DOTS || !(known(i - 1) || known(i + 1))) dots.push(draw("circle", { cx: x, cy: y, r: 2.2 }));
    });
    return [draw("path", { d: path }), ...dots];
  }

  // The values under the pointer: of all lines where they are few, else of those nearest to it.
  look(event) {
    const at = this.place(event), step = this.stepAt(at.x);
    const points = this.lines.map(line => {
      const i = nearest(line.steps, step), value = line.values[i];
      return { line, value, step: line.steps[i], distance: value === null ? Infinity : Math.abs(this.y(value) - at.y) };
    }).sort((a, b) => a.distance - b.distance);
    if (!points.length) return this.clear();
    const [closest] = points, x = this.x(closest.step);
    this.overlay.replaceChildren(
      draw("line", { class: "cross", x1: x, x2: x, y1: MARGIN.top, y2: this.height - MARGIN.bottom }));
    this.fillTip(points.slice(0, IN_TIP), points.length, closest);
    const left = at.x < this.width / 2, scale = this.node.clientWidth / this.width;
    this.tip.style.left = left ? `${x * scale + 12}px` : "";
    this.tip.style.right = left ? "" : `${(this.width - x) * scale + 12}px`;
    this.tip.style.top = `${this.svg.getBoundingClientRect().top - this.node.getBoundingClientRect().top + MARGIN.top}px`;
    this.board.focus(closest.line.group);
  }

  fillTip(points, count, closest) {
    const rows = [...points].sort((a, b) => (b.value ?? -Infinity) - (a.value ?? -Infinity)).map(point =>
      make("div", { class: point === closest ? "near" : "" },
        swatch(point.line.group), make("span", {}, point.line.name), short(point.value)));
    const rest = count > points.length ? [`and ${count - points.length} more`] : [];
    this.tip.replaceChildren(`step ${closest.step}`, ...rows, ...rest);
    this.tip.hidden = false;
  }

  select(event) {
    const box = this.selection(this.place(event));
    this.tip.hidden = true;
    this.overlay.replaceChildren(draw("rect", { class: "box", ...box }));
  }

  // The rectangle between where a drag began and `at`; over the whole height when it is flat.
  selection(at) {
    const flat = Math.abs(at.y - this.start.y) < 24;
    return {
      x: Math.min(at.x, this.start.x), width: Math.abs(at.x - this.start.x),
      y: flat ? MARGIN.top : Math.min(at.y, this.start.y),
      height: flat ? this.height - MARGIN.top - MARGIN.bottom : Math.abs(at.y - this.start.y),
    };
  }

  zoom(event) {
    if (!this.start) return;
    const box = this.selection(this.place(event)), whole = this.height - MARGIN.top - MARGIN.bottom;
    this.start = null;
    if (box.width < 8) return;
    if (box.height < whole) this.heights = [this.valueAt(box.y + box.height), this.valueAt(box.y)];
    this.board.show([this.stepAt(box.x), this.stepAt(box.x + box.width)]);
  }

  focus(group) {
    this.plot.classList.toggle("focused", group !== null);
    for (const line of this.lines) line.node.classList.toggle("near", line.group === group);
  }

  clear() {
    this.overlay.replaceChildren();
    this.tip.hidden = true;
    this.board.focus(null);
  }
}

// ---------------------------------------------------------------------------------------------------- all charts

class Board {
  constructor(data, node) {
    this.data = data;
    this.span = null;
    const { ofRuns, ofTasks } = viewsOf(data);
    this.views = [...ofRuns, ...ofTasks];
    this.charts = Object.entries(data.quantities).map(([key, title]) => new Chart(this, key, title));
    this.legend = make("div", { class: "legend", role: "group", "aria-label": "Lines that are shown" });
    const charts = make("div", { class: "charts" }, ...this.charts.map(chart => chart.node));
    node.replaceChildren(this.controls(ofRuns, ofTasks), this.legend, charts);
    this.choose(data.first);
    new ResizeObserver(() => this.render()).observe(charts);
  }

  controls(ofRuns, ofTasks) {
    const option = (view, i) => make("option", { value: i }, view.title);
    const select = make("select", {}, make("optgroup", { label: "The tasks of a run" }, ...ofRuns.map(option)));
    if (ofTasks.length) {
      const options = ofTasks.map((view, i) => option(view, ofRuns.length + i));
      select.append(make("optgroup", { label: "All runs at a task" }, ...options));
    }
    select.value = this.data.first;
    select.addEventListener("change", () => this.choose(Number(select.value)));
    this.filter = make("input", { type: "search", placeholder: "find a line", "aria-label": "Find a line", size: 12 });
    this.filter.addEventListener("input", () => { this.fillLegend(); this.render(); });
    const button = (text, act) => {
      const made = make("button", { type: "button" }, text);
      made.addEventListener("click", act);
      return made;
    };
    return make("div", { class: "controls" }, make("label", {}, "Show", select), this.filter,
      button("all", () => this.hide([])), button("none", () => this.hide(this.view.groups.keys())),
      button("reset zoom", () => this.reset()));
  }

  choose(index) {
    this.view = this.views[index];
    this.hidden = new Set();
    this.filter.value = "";
    const used = Object.keys(this.data.quantities).flatMap(key => this.view.lines(key)).filter(line => line.curve);
    this.used = new Set(used.map(line => line.group));
    const ends = used.flatMap(line => [this.data.steps[line.curve[0]][0], this.data.steps[line.curve[0]].at(-1)]);
    const [first, last] = ends.reduce(([low, high], s) => [Math.min(low, s), Math.max(high, s)], [Infinity, -Infinity]);
    this.wholeSpan = ends.length ? (last > first ? [first, last] : [first - 1, last + 1]) : [0, 1];
    this.charts.forEach(chart => { chart.log = null; });
    this.fillLegend();
    this.reset();
  }

  isFound(group) { return this.view.groups[group].toLowerCase().includes(this.filter.value.toLowerCase()); }

  isShown(group) { return !this.hidden.has(group) && this.isFound(group); }

  hide(groups) {
    this.hidden = new Set(groups);
    this.fillLegend();
    this.render();
  }

  fillLegend() {
    const entries = [...this.view.groups.keys()].filter(group => this.used.has(group) && this.isFound(group));
    this.legend.replaceChildren(...entries.map(group => {
      const button = make("button", { type: "button" }, swatch(group), make("span", {}, this.view.groups[group]));
      button.title = this.view.groups[group];
      const press = () => button.setAttribute("aria-pressed", String(!this.hidden.has(group)));
      button.addEventListener("click", () => {
        if (!this.hidden.delete(group)) this.hidden.add(group);
        press();
        this.render();
      });
      button.addEventListener("pointerenter", () => this.focus(group));
      button.addEventListener("pointerleave", () => this.focus(null));
      press();
      return button;
    }));
  }

  focus(group) { this.charts.forEach(chart => chart.focus(group)); }

  render() { this.charts.forEach(chart => chart.render()); }

  show(span) {
    const [first, last] = this.wholeSpan;
    const [low, high] = [Math.max(span[0], first), Math.min(span[1], last)];
    if (high > low) this.span = [low, high];
    this.render();
  }

  move(factor, shift) {
    const [low, high] = this.span ?? this.wholeSpan, [first, last] = this.wholeSpan;
    const size = Math.min((high - low) * factor, last - first);
    const middle = Math.min(Math.max((low + high) / 2 + shift * size, first + size / 2), last - size / 2);
    this.show([middle - size / 2, middle + size / 2]);
  }

  reset() {
    this.span = null;
    this.charts.forEach(chart => { chart.heights = null; });
    this.render();
  }
}

const data = JSON.parse(document.getElementById("data").textContent);
if (data) new Board(data, document.getElementById("charts"));

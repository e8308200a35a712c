(function () {
  "use strict";
  // One list of rows feeds the plot and the table: a filter, the mean over seeds and the front apply to both.
  const data = JSON.parse(document.getElementById("sweep-data").textContent);
  const byId = (id) => document.getElementById(id);
  const form = document.querySelector(".controls");
  const node = byId("pareto");
  const plotted = Boolean(node && window.Plotly && data.xs);
  // Okabe and Ito's colours without black and yellow, for values without an order; viridis for those with one.
  const UNORDERED = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00"];
  const ORDERED = ["--ordered-0", "--ordered-1", "--ordered-2", "--ordered-3", "--ordered-4", "--ordered-5"];

  const bodies = Object.fromEntries([...document.querySelectorAll("tbody[data-mode]")].map((b) => [b.dataset.mode, b]));
  const rows = Object.fromEntries(Object.entries(bodies).map(([mode, body]) => [mode, [...body.rows]]));
  const mode = () => (byId("means") && byId("means").checked ? "mean" : "single");

  // --- filters ---------------------------------------------------------------------------------------------------

  const filters = [...document.querySelectorAll("[data-filter]")].map((box) => ({
    box, name: box.dataset.filter, all: box.querySelector(".all"), inputs: [...box.querySelectorAll("input")],
  }));
  const chosen = (filter) => filter.inputs.filter((input) => input.checked).map((input) => input.value);
  const axisOf = (row, axis) => row.cells[1 + data.axes.indexOf(axis)].dataset.value;

  function visible() {
    const active = filters.map((f) => ({ name: f.box.dataset.filter, kind: f === filters[0], values: chosen(f) }))
      .filter((f) => f.values.length);
    return rows[mode()].filter((row) =>
      active.every((f) => f.values.includes(f.kind ? row.dataset.kind : axisOf(row, f.name))));
  }

  // --- the front -------------------------------------------------------------------------------------------------

  // Indices of the points that no other beats: cheapest first, each more robust than all before. Equals stay together.
  function paretoFront(points, larger) {
    const cost = (p) => (larger ? -p.x : p.x);
    const order = points.filter((p) => p.entry.verdict !== "suspect").sort((a, b) => cost(a) - cost(b) || b.y - a.y);
    const front = [];
    order.forEach((p) => {
      const last = front[front.length - 1];
      if (!last || p.y > last.y || (p.y === last.y && p.x === last.x)) { front.push(p); }
    });
    return front;
  }

  // --- colours ---------------------------------------------------------------------------------------------------

  const kinds = new Map(data.kinds);
  const parts = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));

  // Between two colours, #rrggbb.
  function mixed(from, to, share) {
    const ends = parts(to);
    return "rgb(" + parts(from).map((v, i) => Math.round(v + (ends[i] - v) * share)).join(",") + ")";
  }

  function colouring() {
    const name = byId("colour").value;
    if (!name) {
      return { title: "", names: [...kinds.keys()], words: (k) => kinds.get(k), of: (e) => e.kind, colour: (k) => css("--" + k) };
    }
    const place = data.axes.indexOf(name);
    const values = data.values[name];
    const colour = (value) => {
      const i = values.indexOf(value);
      if (!data.ordered.includes(name)) { return UNORDERED[i % UNORDERED.length]; }
      if (!value) { return css("--muted"); }
      const place = i / Math.max(1, values.length - 1) * (ORDERED.length - 1);
      return mixed(css(ORDERED[Math.floor(place)]), css(ORDERED[Math.ceil(place)]), place % 1);
    };
    return { names: values, title: name, words: (v) => v || "not set", of: (e) => e.point[place], colour };
  }

  function key(marker, colour, words) {
    const shapes = {
      dot: '<circle cx="9" cy="6" r="4.5" fill="currentColor"/>',
      ring: '<circle cx="9" cy="6" r="4" fill="none" stroke="currentColor" stroke-width="1.8"/>',
      cross: '<path d="M5 2l8 8M13 2l-8 8" stroke="currentColor" stroke-width="2.2"/>',
      line: '<path d="M0 10h9V3h9" fill="none" stroke="currentColor" stroke-width="1.6"/>',
    };
    const item = document.createElement("span");
    item.innerHTML = '<svg viewBox="0 0 18 12">' + shapes[marker] + "</svg>";
    item.firstChild.style.color = colour;
    item.append(words);
    return item;
  }

  // --- the plot --------------------------------------------------------------------------------------------------

  function hover(entry, x, y) {
    const lines = ["<b>" + escapeText(entry.label) + "</b>"];
    data.axes.forEach((axis, i) => { if (entry.point[i]) { lines.push(escapeText(axis + " " + entry.point[i])); } });
    lines.push("seed " + escapeText(entry.seeds), "clean " + entry.shown.clean_accuracy + " %");
    const flag = entry.verdict === "suspect" ? " SUSPECT" : "";
    lines.push(escapeText(y.title.replace("accuracy ", "")) + " " + entry.shown[y.key] + " %" + flag);
    lines.push("masking verdict: " + data.verdicts[entry.verdict]);
    if (x.key !== "clean_accuracy") { lines.push(escapeText(x.title) + " " + escapeText(entry.shown[x.key])); }
    lines.push("trial " + escapeText(entry.trials.replace(/((?:[^,]+, ){3})/g, "$1\n")).replace(/\n/g, "<br>"));
    return lines.join("<br>");
  }

  // 1, 2 and 5 times powers of ten, for a logarithmic axis that people can read.
  function ticks(low, high) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high) + 1; power += 1) {
      [1, 2, 5].forEach((step) => found.push(Number((step * 10 ** power).toPrecision(1))));
    }
    return { type: "log", tickvals: found, ticktext: found.map((v) => v.toLocaleString("en", { maximumSignificantDigits: 1 })) };
  }

  function draw(shown) {
    const x = data.xs[byId("x").value];
    const y = data.ys[byId("y").value];
    const entries = data.entries[mode()];
    const points = shown.map((row) => ({ row, entry: entries[row.dataset.row] }))
      .filter((p) => p.entry.values[x.key] !== undefined && p.entry.values[y.key] !== undefined)
      .map((p) => ({ ...p, x: p.entry.values[x.key] * x.scale, y: p.entry.values[y.key] * 100 }));
    const threats = new Set(points.map((p) => p.entry.threat)).size; // the mildest attack would win against the others
    const front = threats > 1 ? [] : paretoFront(points, x.larger);
    const onFront = new Set(front.map((p) => p.row));
    const colours = colouring();
    const spread = (p, measure, scale) => (p.entry.spread[measure.key] || 0) * scale;
    const small = node.clientWidth < 520;
    const size = small ? 11 : 13;
    const bad = css("--bad");
    const bars = (measure, scale) => ({
      type: "data", array: points.map((p) => spread(p, measure, scale)), visible: mode() === "mean",
      color: css("--muted"), thickness: 1, width: 3,
    });
    const steps = front.slice().sort((a, b) => a.x - b.x || a.y - b.y);
    const traces = [{
      type: "scatter", mode: "lines", x: steps.map((p) => p.x), y: steps.map((p) => p.y), hoverinfo: "skip",
      line: { color: css("--accent"), width: 1.6, shape: x.larger ? "vh" : "hv" },
    }, {
      type: "scatter", mode: "markers", x: points.map((p) => p.x), y: points.map((p) => p.y),
      hovertemplate: points.map((p) => hover(p.entry, x, y) + "<extra></extra>"),
      error_x: bars(x, x.scale), error_y: bars(y, 100),
      marker: {
        symbol: points.map((p) => ({ ok: "circle", suspect: "x-thin-open", not_run: "circle-open" })[p.entry.verdict]),
        size: points.map((p) => (onFront.has(p.row) ? 13 : 9)),
        color: points.map((p) => (p.entry.verdict === "suspect" ? bad : colours.colour(colours.of(p.entry)))),
        opacity: points.map((p) => (onFront.has(p.row) || p.entry.verdict === "suspect" ? 1 : 0.72)),
        line: {
          width: points.map((p) => (p.entry.verdict === "ok" ? (onFront.has(p.row) ? 1.6 : 0.8) : 2.2)),
          color: points.map((p) => (p.entry.verdict === "suspect" ? bad : p.entry.verdict === "not_run"
            ? colours.colour(colours.of(p.entry)) : onFront.has(p.row) ? css("--ink") : css("--paper"))),
        },
      },
    }];
    const all = points.map((p) => p.x).filter((v) => v > 0);
    const wide = all.length === points.length && !x.larger && Math.max(...all) / Math.min(...all) > 8;
    const axis = (title, more) => ({
      title: { text: escapeText(title), standoff: 10, font: { size, color: css("--ink") } }, gridcolor: css("--rule"),
      zeroline: false, tickfont: { size: size - 1, color: css("--muted") }, fixedrange: small, ...more,
    });
    window.Plotly.react(node, traces, {
      width: node.clientWidth, height: node.clientHeight, margin: { l: 58, r: 14, t: 12, b: 52 }, showlegend: false,
      hovermode: "closest", dragmode: small ? false : "zoom", paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: FONT, color: css("--ink") },
      hoverlabel: { bgcolor: css("--surface"), bordercolor: css("--rule"), font: { color: css("--ink"), size: 12 }, align: "left" },
      xaxis: axis(x.title + ", " + x.unit + (wide ? " (logarithmic)" : ""), wide ? ticks(Math.min(...all), Math.max(...all)) : { type: "linear" }),
      yaxis: axis(y.title + ", %"),
    }, { displayModeBar: false, displaylogo: false });

    const used = new Set(points.filter((p) => p.entry.verdict !== "suspect").map((p) => colours.of(p.entry)));
    const title = document.createElement("b");
    title.textContent = colours.title;
    const keys = colours.names.filter((name) => used.has(name)).map((name) => key("dot", colours.colour(name), colours.words(name)));
    if (front.length) { keys.push(key("line", css("--accent"), "Pareto-optimal")); }
    if (points.some((p) => p.entry.verdict === "not_run")) { keys.push(key("ring", css("--muted"), "masking not checked")); }
    if (points.some((p) => p.entry.verdict === "suspect")) { keys.push(key("cross", bad, "suspect")); }
    byId("legend").replaceChildren(...(colours.title ? [title] : []), ...keys);
    rows[mode()].forEach((row) => row.classList.toggle("front", onFront.has(row)));
    node.points = points;
    return { count: points.length, front: front.length, without: shown.length - points.length, threats, x, y };
  }

  // --- the table -------------------------------------------------------------------------------------------------

  const headers = [...document.querySelectorAll(".trials thead th")];
  const byWords = new Intl.Collator("en", { numeric: true });

  function sortBy(column, descending) {
    const numeric = headers[column].dataset.sort === "number";
    const axis = headers[column].dataset.sort === "axis" && data.values ? data.values[data.axes[column - 1]] : null;
    const value = (row) => (column ? row.cells[column].dataset.value : row.cells[0].textContent);
    const compare = (a, b) => {
      if (a === "" || b === "") { return (a === "") - (b === ""); } // what is missing stays last, either way
      const order = numeric ? Number(a) - Number(b) : axis ? axis.indexOf(a) - axis.indexOf(b) : byWords.compare(a, b);
      return descending ? -order : order;
    };
    Object.keys(rows).forEach((name) => {
      const sorted = rows[name].map((row) => [value(row), row]).sort((a, b) => compare(a[0], b[0]));
      bodies[name].append(...sorted.map((pair) => pair[1]));
    });
    headers.forEach((th, i) => {
      if (i === column) { th.setAttribute("aria-sort", descending ? "descending" : "ascending"); } else { th.removeAttribute("aria-sort"); }
    });
  }

  function update() {
    const shown = visible();
    const wanted = new Set(shown);
    const now = mode();
    Object.entries(bodies).forEach(([name, body]) => { body.hidden = name !== now; });
    rows[now].forEach((row) => { row.hidden = !wanted.has(row); });
    filters.forEach((f) => f.all.setAttribute("aria-pressed", String(!chosen(f).length)));
    let words = shown.length + " of " + rows[now].length + " rows shown";
    if (plotted) {
      const drawn = draw(shown);
      words += drawn.threats > 1
        ? "; " + drawn.threats + " threat models: filter for one to see which of its points are Pareto-optimal"
        : "; " + drawn.front + " of " + drawn.count + " points Pareto-optimal in " + drawn.x.title + " and " + drawn.y.title;
      if (drawn.without) { words += "; " + drawn.without + " without these numbers stand in the table only"; }
    }
    byId("status").textContent = words + ".";
  }

  headers.forEach((th, column) => th.querySelector("button").addEventListener("click", () => {
    const larger = th.dataset.sort === "number" && !th.hasAttribute("aria-sort") && /robust|clean/.test(th.textContent);
    sortBy(column, larger || th.getAttribute("aria-sort") === "ascending");
  }));
  filters.forEach((f) => f.all.addEventListener("click", () => {
    f.inputs.forEach((input) => { input.checked = false; });
    update();
  }));
  form.addEventListener("change", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  document.querySelectorAll(".hint").forEach((hint) => { hint.hidden = !plotted; });
  update();
  if (plotted) {
    node.on("plotly_click", (event) => { // shows the row of a point
      const point = event.points.find((p) => p.curveNumber === 1);
      if (!point) { return; }
      document.querySelectorAll(".picked").forEach((row) => row.classList.remove("picked"));
      const row = node.points[point.pointNumber].row;
      row.classList.add("picked");
      row.scrollIntoView({ block: "nearest" });
    });
    keepDrawn(node, update);
  }
}());

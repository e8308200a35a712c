(function () {
  "use strict";
  const node = document.getElementById("tradeoff");
  const source = document.getElementById("tradeoff-data");
  if (!node || !source || !window.Plotly) { return; }
  const data = JSON.parse(source.textContent);

  function overlap(a, b) {
    return Math.max(0, Math.min(a[2], b[2]) - Math.max(a[0], b[0])) *
      Math.max(0, Math.min(a[3], b[3]) - Math.max(a[1], b[1]));
  }

  // Greedy: each label takes the place around its bubble where it covers least of bubbles, arrows and other labels.
  function placeLabels(spots, boxes, area) {
    const taken = boxes.concat(spots.map((s) => [s.px - s.r, s.py - s.r, s.px + s.r, s.py + s.r]));
    return spots.map((s) => {
      let best = null;
      [5, 20, 38, 60].forEach((gap, ring) => {
        for (let turn = 0; turn < 16; turn += 1) {
          const beside = s.px + Math.cos(turn * Math.PI / 8) * (s.r + gap + s.width / 2);
          const cx = Math.max(s.width / 2, Math.min(beside, area[0] - s.width / 2));
          const cy = s.py - Math.sin(turn * Math.PI / 8) * (s.r + gap + 8);
          const frame = [cx - s.width / 2, cy - 8, cx + s.width / 2, cy + 8];
          const outside = Math.max(0, -frame[0]) + Math.max(0, -frame[1]) +
            Math.max(0, frame[2] - area[0]) + Math.max(0, frame[3] - area[1]);
          const cost = taken.reduce((sum, other) => sum + overlap(frame, other), 0) +
            60 * outside + 40 * ring + (turn % 4 ? 6 : 0);
          if (best === null || cost < best.cost) { best = { cost, cx, cy, frame }; }
        }
      });
      taken.push(best.frame);
      return best;
    });
  }

  function draw() {
    const width = node.clientWidth;
    const height = node.clientHeight;
    const small = width < 520;
    const margin = { l: 54, r: 12, t: 10, b: 50 };
    const area = [width - margin.l - margin.r, height - margin.t - margin.b];
    const scale = small ? 0.75 : 1;
    const size = small ? 11 : 13;
    const pen = document.createElement("canvas").getContext("2d");
    const measure = (p) => {
      pen.font = (p.kind === "artifact" ? "700 " : "400 ") + size + "px " + FONT;
      return pen.measureText(p.label).width + 2;
    };
    const spots = data.points.map((p) => ({
      px: (p.x - data.xrange[0]) / (data.xrange[1] - data.xrange[0]) * area[0],
      py: (1 - (p.y - data.yrange[0]) / (data.yrange[1] - data.yrange[0])) * area[1],
      r: Math.max(4.5, p.diameter * scale / 2),
      width: measure(p),
    }));
    const arrows = data.arrows.filter(([a, b]) =>
      Math.hypot(spots[a].px - spots[b].px, spots[a].py - spots[b].py) > spots[a].r + spots[b].r + 8);
    const boxes = [];
    arrows.forEach(([a, b]) => {
      const steps = 150; // dense, so that crossing an arrow costs a label more than moving away
      for (let i = 0; i <= steps; i += 1) {
        const x = spots[a].px + (spots[b].px - spots[a].px) * i / steps;
        const y = spots[a].py + (spots[b].py - spots[a].py) * i / steps;
        boxes.push([x - 3, y - 3, x + 3, y + 3]);
      }
    });
    const places = placeLabels(spots, boxes, area);
    const annotations = arrows.map(([a, b]) => ({
      x: data.points[b].x, y: data.points[b].y, ax: data.points[a].x, ay: data.points[a].y,
      xref: "x", yref: "y", axref: "x", ayref: "y", text: "", showarrow: true, arrowhead: 2, arrowsize: 1.1,
      arrowwidth: 1.4, arrowcolor: css("--muted"), standoff: spots[b].r + 4, startstandoff: spots[a].r + 3,
    })).concat(data.points.map((p, i) => {
      const place = places[i];
      const dx = place.cx - spots[i].px;
      const dy = place.cy - spots[i].py;
      const away = Math.max(Math.abs(dx) - spots[i].width / 2, Math.abs(dy) - 8) > spots[i].r + 14;
      const words = escapeText(p.label);
      return {
        x: p.x, y: p.y, xref: "x", yref: "y", ax: dx, ay: dy, showarrow: true, arrowhead: 0,
        arrowwidth: 0.8, arrowcolor: away ? css("--muted") : "rgba(0,0,0,0)", standoff: spots[i].r,
        text: p.kind === "artifact" ? "<b>" + words + "</b>" : words, borderpad: 0, captureevents: false,
        font: { size, color: p.suspect ? css("--bad") : css("--ink") },
      };
    }));
    const order = data.points.map((p, i) => i).sort((a, b) => data.points[b].diameter - data.points[a].diameter);
    const traces = order.map((i) => {
      const p = data.points[i];
      return {
        type: "scatter", mode: "markers", x: [p.x], y: [p.y], name: escapeText(p.label),
        hovertemplate: "<b>" + escapeText(p.label) + "</b><br>" + p.hover + "<extra></extra>",
        marker: {
          size: 2 * spots[i].r, color: css("--" + p.kind), opacity: 0.93,
          line: { width: p.suspect ? 2.5 : 1.5, color: p.suspect ? css("--bad") : css("--paper") },
        },
      };
    });
    const axis = (title, range) => ({
      title: { text: title, standoff: 10, font: { size: size, color: css("--ink") } }, range: range, fixedrange: true,
      gridcolor: css("--rule"), zeroline: false, tickfont: { size: size - 1, color: css("--muted") }, nticks: small ? 5 : 8,
    });
    window.Plotly.react(node, traces, {
      width, height, margin, annotations, showlegend: false, hovermode: "closest", dragmode: false,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: FONT, color: css("--ink") },
      hoverlabel: { bgcolor: css("--surface"), bordercolor: css("--rule"), font: { color: css("--ink") } },
      xaxis: axis(data.xtitle, data.xrange), yaxis: axis(data.ytitle, data.yrange),
    }, { displayModeBar: false, displaylogo: false, scrollZoom: false });
  }

  draw();
  keepDrawn(node, draw);
}());

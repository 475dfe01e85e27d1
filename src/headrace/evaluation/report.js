"use strict";
// What answers to the reader: sorting, drawing, choices, bins, light and dark, print.
(() => {
  const root = document.documentElement;
  const specs = JSON.parse(document.getElementById("charts").textContent);
  const FINER = Number(root.dataset.finer); // bins in the file per bin of the rule
  const figures = [...document.querySelectorAll(".plot")];
  const drawn = new Set();
  const isCoarse = matchMedia("(pointer: coarse)").matches;
  const SERIES = 8; // colours of the palette
  const PRINTED = { wide: 680, narrow: 328 }; // pixels across a printed figure

  // --- tables ---------------------------------------------------------------------------------
  const collator = new Intl.Collator(undefined, { numeric: true });
  for (const button of document.querySelectorAll("th > button")) {
    button.addEventListener("click", () => {
      const heading = button.parentElement;
      const table = heading.closest("table");
      const turn = heading.ariaSort === "ascending" ? -1 : 1;
      for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
      heading.ariaSort = turn === 1 ? "ascending" : "descending";
      const value = (row) => {
        const cell = row.cells[heading.cellIndex];
        const text = cell.textContent.trim().replace(/(?<=\d),(?=\d{3})/g, "");
        return cell.dataset.value ?? (text === "–" ? "" : text);
      };
      const compare = (a, b) => {
        if (a === "" || b === "") return (a === "") - (b === ""); // what is not there comes last
        const isNumber = !isNaN(a) && !isNaN(b);
        return turn * (isNumber ? a - b : collator.compare(a, b));
      };
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => compare(value(a), value(b)));
      table.tBodies[0].append(...rows);
    });
  }

  // --- colours --------------------------------------------------------------------------------
  const palette = () => {
    const probe = document.body.appendChild(document.createElement("span"));
    const of = (name) => {
      probe.style.color = `var(--${name})`;
      return getComputedStyle(probe).color;
    };
    const names = ["paper", "card", "ink", "soft", "line", "faint", "accent",
      "chosen", "tied", "better", "worse", "unknown"];
    const found = Object.fromEntries(names.map((name) => [name, of(name)]));
    found.series = Array.from({ length: SERIES }, (_, i) => of(`series-${i}`));
    probe.remove();
    return found;
  };
  const fade = (rgb, alpha) => rgb.replace("rgb(", "rgba(").replace(")", `, ${alpha})`);

  const deep = (one, other) => {
    const out = { ...one };
    for (const [key, value] of Object.entries(other ?? {})) {
      const isObject = value && typeof value === "object" && !Array.isArray(value);
      out[key] = isObject ? deep(out[key] ?? {}, value) : value;
    }
    return out;
  };

  // --- traces ---------------------------------------------------------------------------------
  const merged = ({ edges, share }, size) => {
    const x = [], y = [];
    for (let i = 0; i < share.length; i += size) {
      x.push(edges[i]);
      y.push(share.slice(i, i + size).reduce((sum, one) => sum + one, 0));
    }
    x.push(edges[share.length]);
    y.push(y.at(-1));
    return { x, y };
  };
  const scale = (colours) => {
    const font = { color: colours.soft, size: 11 };
    return { tickfont: font, title: { font, side: "right" }, thickness: 12, outlinewidth: 0 };
  };
  const painted = (spec, colours, state) => spec.traces
    .map((trace, index) => [trace, index])
    .filter(([trace]) => !trace.choice || trace.choice === state.choice)
    .map(([{ tone, choice, bins, ...trace }, index]) => {
      tone ??= index;
      const ink = typeof tone === "number" ? colours.series[tone % SERIES] : colours[tone];
      if (bins) {
        Object.assign(trace, merged(bins, state.bins));
        if (spec.layout.yaxis.type === "log") trace.y = trace.y.map((one) => one || null);
      }
      if (trace.type === "heatmap") {
        trace.colorscale ??= [[0, colours.faint], [1, colours.accent]];
        trace.colorbar = deep(scale(colours), trace.colorbar);
        return { xgap: 0.5, ygap: 0.5, ...trace };
      }
      trace.line = { color: ink, width: 1.8, ...trace.line };
      const marker = { color: ink, ...trace.marker };
      if (trace.type === "bar") marker.line = { width: 0, ...marker.line };
      if (marker.colorbar) marker.colorbar = deep(scale(colours), marker.colorbar);
      trace.marker = marker;
      for (const bar of ["error_x", "error_y"]) {
        if (trace[bar]) trace[bar] = { color: ink, thickness: 1.4, width: 0, ...trace[bar] };
      }
      if (trace.fill) trace.fillcolor ??= fade(ink, 0.08);
      return trace;
    });

  // --- layout ---------------------------------------------------------------------------------
  const axis = (colours) => ({
    automargin: true, gridcolor: colours.line, linecolor: colours.line,
    zeroline: false, zerolinecolor: colours.soft,
    tickcolor: colours.line, showline: true, ticks: "outside", ticklen: 4,
  });
  const laidOut = (node, spec, colours, state) => {
    const { choices, ...own } = spec.layout;
    let layout = deep(own, choices?.[state.choice]);
    for (const key of Object.keys(layout)) {
      if (!/^[xy]axis\d*$/.test(key)) continue;
      layout[key] = deep(axis(colours), layout[key]);
      const isNames = spec.traces.some((trace) => typeof trace[key[0]]?.[0] === "string");
      if (!isNames) { // few numbers, upright; but every name
        layout[key] = { tickangle: 0, nticks: node.clientWidth < 420 ? 5 : 8, ...layout[key] };
      }
      layout[key].title = deep({ standoff: 10, font: { size: 12.5, color: colours.soft } },
        layout[key].title);
    }
    const colourless = { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)" };
    layout = deep({
      ...colourless,
      autosize: true,
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colours.ink },
      margin: { l: 10, r: 14, t: 10, b: 10 },
      colorway: colours.series,
      showlegend: spec.traces.some((trace) => trace.name && trace.showlegend !== false),
      legend: { orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom",
        maxheight: 0.3 },
      hoverlabel: { bgcolor: colours.card, bordercolor: colours.soft,
        font: { color: colours.ink } },
      dragmode: isCoarse ? false : "zoom", // on a touch screen a drag scrolls the page
    }, layout);
    if (state.width) Object.assign(layout, { width: state.width, autosize: false });
    return layout;
  };
  const config = {
    responsive: true, displaylogo: false,
    modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"],
  };

  // --- drawing --------------------------------------------------------------------------------
  const states = new Map(figures.map((node) => {
    const choice = specs[node.id].traces.find((trace) => trace.choice)?.choice;
    return [node, { choice, bins: FINER, width: 0 }];
  }));
  const draw = (node, colours = palette()) => {
    const spec = structuredClone(specs[node.id]);
    const state = states.get(node);
    drawn.add(node);
    return Plotly.react(
      node, painted(spec, colours, state), laidOut(node, spec, colours, state), config,
    );
  };
  const redraw = () => {
    const colours = palette();
    for (const node of drawn) draw(node, colours);
  };
  for (const control of document.querySelectorAll("select[data-of]")) {
    const node = document.getElementById(control.dataset.of);
    control.addEventListener("change", () => {
      const { value } = control;
      states.get(node)[control.name] = control.name === "bins" ? Number(value) : value;
      draw(node);
    });
  }
  // First what is near the screen, then, whenever there is time, the rest.
  const watcher = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (isIntersecting && !drawn.has(target)) draw(target);
      if (isIntersecting) watcher.unobserve(target);
    }
  }, { rootMargin: "400px" });
  figures.forEach((node) => watcher.observe(node));
  const later = window.requestIdleCallback ?? ((call) => setTimeout(call, 50));
  const drawNext = () => {
    const node = figures.find((one) => !drawn.has(one));
    if (!node) return;
    draw(node);
    later(drawNext);
  };
  addEventListener("load", () => later(drawNext));

  // On a small screen the answer comes first, and the contents when asked for.
  document.getElementById("contents").open = !matchMedia("(max-width: 68rem)").matches;

  // --- light, dark, print ---------------------------------------------------------------------
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const toggle = document.getElementById("theme");
  const isDark = () => (root.style.colorScheme || (dark.matches ? "dark" : "light")) === "dark";
  const label = () => { toggle.textContent = isDark() ? "Light theme" : "Dark theme"; };
  toggle.addEventListener("click", () => {
    root.style.colorScheme = isDark() ? "light" : "dark";
    label();
    redraw();
  });
  dark.addEventListener("change", () => { label(); redraw(); });
  label();
  toggle.hidden = false;

  // Paper is white: charts are drawn again in light colours, as wide as the page.
  let before = null; // what to go back to while printing
  const startPrint = () => {
    if (before) return;
    const folds = [...document.querySelectorAll("details:not([open])")];
    before = { scheme: root.style.colorScheme, folds };
    root.style.colorScheme = "light";
    for (const fold of folds) fold.open = true;
    const colours = palette();
    for (const [node, state] of states) {
      state.width = node.dataset.wide ? PRINTED.wide : PRINTED.narrow;
      draw(node, colours);
    }
  };
  const endPrint = () => {
    if (!before) return;
    root.style.colorScheme = before.scheme;
    for (const fold of before.folds) fold.open = false;
    before = null;
    for (const state of states.values()) state.width = 0;
    redraw();
  };
  const paper = matchMedia("print");
  paper.addEventListener("change", () => (paper.matches ? startPrint() : endPrint()));
  addEventListener("beforeprint", startPrint);
  addEventListener("afterprint", endPrint);
})();

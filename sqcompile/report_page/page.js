"use strict";
(() => {
  const report = JSON.parse(document.getElementById("data").textContent);

  // --- elements and numbers ---------------------------------------------------------------------------------

  const fill = (element, attributes, children) => {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
    }
    for (const child of children.flat(Infinity)) {
      if (child !== null && child !== undefined) element.append(child);
    }
    return element;
  };
  const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
  const s = (tag, attributes, ...children) =>
    fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

  const scaled = (value, units) => {
    const [limit, unit, digits] = units.find(([from]) => Math.abs(value) >= from) || units[units.length - 1];
    return `${(value / (limit || 1)).toFixed(digits)} ${unit}`;
  };
  const size = (bytes) => scaled(bytes, [[1e9, "GB", 2], [1e6, "MB", 2], [1e3, "kB", 2], [0, "B", 0]]);
  const time = (ns) => ns === null || ns === undefined ? "" :
    scaled(ns, [[1e9, "s", 2], [1e6, "ms", 2], [1e3, "µs", 2], [0, "ns", 0]]);
  const percent = (share) => share > 0 && share < 0.0005 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`;
  const short = (value) => value === 0 ? "0" : Math.abs(value) >= 0.01 && Math.abs(value) < 1e5 ?
    String(Number(value.toPrecision(3))) : value.toExponential(1);
  // JSON has no infinity: an SQNR of null is that of equal values, unless there is an error.
  const level = (distance) => {
    if (!distance) return null;
    if (!distance.finite) return -Infinity;
    if (distance.sqnr_db !== null) return distance.sqnr_db;
    return distance.max_error === 0 ? Infinity : -Infinity;
  };
  const sqnr = (distance) => {
    const value = level(distance);
    if (value === null) return "";
    if (!distance.finite) return "not finite";
    return value === Infinity ? "exact" : value === -Infinity ? "no signal" : `${value.toFixed(1)} dB`;
  };

  // --- tables that sort and filter ----------------------------------------------------------------------------

  // columns: {title, number, value(row): to sort by, show(row): text or element}
  const sortable = (columns, rows, style) => {
    const body = h("tbody");
    const lines = rows.map((row) => {
      const cells = columns.map((column) =>
        h("td", { class: column.number ? "number" : column.name ? "name" : null }, (column.show || column.value)(row)));
      return { row, element: h("tr", { class: style ? style(row) : null }, cells) };
    });
    const heads = columns.map((column, index) =>
      h("th", { class: column.number ? "number" : null, scope: "col" },
        h("button", { type: "button", onclick: () => sort(index) }, column.title)));
    const sort = (index) => {
      const descending = heads[index].getAttribute("aria-sort") === "ascending";
      heads.forEach((head) => head.removeAttribute("aria-sort"));
      heads[index].setAttribute("aria-sort", descending ? "descending" : "ascending");
      const sign = descending ? -1 : 1;
      const key = columns[index].value;
      lines.sort((a, b) => {
        const [left, right] = [key(a.row), key(b.row)];
        const missing = (value) => value === null || value === undefined || value === "";
        if (missing(left) || missing(right)) return Number(missing(left)) - Number(missing(right));
        if (left === right) return 0;
        return sign * (typeof left === "number" ? left - right : String(left).localeCompare(String(right)));
      });
      body.append(...lines.map((line) => line.element));
    };
    body.append(...lines.map((line) => line.element));
    const table = h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, heads)), body));
    const filter = (text) => {
      const words = text.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const line of lines) {
        const content = line.element.textContent.toLowerCase();
        line.element.hidden = !words.every((word) => content.includes(word));
        shown += line.element.hidden ? 0 : 1;
      }
      return shown;
    };
    return { table, filter };
  };

  // --- overview -----------------------------------------------------------------------------------------------

  const card = (label, value, note) =>
    h("div", { class: "card" }, h("div", { class: "label" }, label), h("div", { class: "value" }, value),
      h("div", { class: "note" }, note));

  const pair = (name, before, after, show) => {
    const most = Math.max(before, after, 1e-30);
    const bar = (value, kind) => h("div", { class: `bar ${kind}` },
      h("i", { style: `width: ${(75 * value / most).toFixed(2)}%` }), show(value));
    return h("div", { class: "pair" }, h("div", { class: "name" }, name), bar(before, "before"), bar(after, "after"));
  };

  const overview = () => {
    const { original, size: compiled, latency } = report;
    const cards = [];
    const pairs = [];
    if (original.size_bytes) {
      cards.push(card("weights", `${(original.size_bytes / Math.max(1, compiled.size_bytes)).toFixed(2)}x smaller`,
        `${size(original.size_bytes)} → ${size(compiled.size_bytes)}`));
      pairs.push(pair("weights", original.size_bytes, compiled.size_bytes, size));
    }
    if (report.dense_file_bytes) {
      cards.push(card("file", `${(report.dense_file_bytes / Math.max(1, report.file_bytes)).toFixed(2)}x smaller`,
        `${size(report.dense_file_bytes)} → ${size(report.file_bytes)}`));
      pairs.push(pair("file", report.dense_file_bytes, report.file_bytes, size));
    } else if (report.file_bytes) {
      cards.push(card("file", size(report.file_bytes), "as saved"));
    }
    if (latency) {
      const ratio = latency.dense_ns / latency.compiled_ns;
      cards.push(card("latency", ratio >= 1 ? `${ratio.toFixed(2)}x faster` : `${(1 / ratio).toFixed(2)}x slower`,
        `${time(latency.dense_ns)} → ${time(latency.compiled_ns)}, median of ${latency.runs} alternating calls, ` +
        `${latency.threads} threads`));
      pairs.push(pair("latency", latency.dense_ns, latency.compiled_ns, time));
    }
    for (const [name, [before, after]] of Object.entries(report.quality || {})) {
      cards.push(card(name, short(after), `${short(before)} before`));
      pairs.push(pair(name, before, after, short));
    }
    if (report.output_distance) {
      cards.push(card("outputs", sqnr(report.output_distance), "against the original, on the check batch"));
    }
    if (report.backend_distance) {
      cards.push(card("backend", sqnr(report.backend_distance), `${report.backend} against the reference`));
    }
    const bits = compiled.parameters ? 8 * compiled.size_bytes / compiled.parameters : 0;
    const zeros = compiled.weights ? compiled.zeros / compiled.weights : 0;
    cards.push(card("parameters", compiled.parameters.toLocaleString("en"),
      `${bits.toFixed(2)} bits each, ${percent(zeros)} zeros`));
    const parts = [h("div", { class: "cards" }, cards)];
    if (pairs.length) parts.push(h("h2", {}, "Before and after"), h("div", { class: "box" }, pairs));
    const blamed = [];
    if (report.worst_pass) blamed.push(h("li", {}, "Most noise came with the pass ", h("code", {}, report.worst_pass)));
    if (report.worst_layer) blamed.push(h("li", {}, "Most noise is made in the layer ", h("code", {}, report.worst_layer)));
    const notes = report.notes.map((note) => h("li", {}, note));
    if (blamed.length + notes.length) {
      parts.push(h("h2", {}, "Notes"), h("div", { class: "box" }, h("ul", { class: "plain" }, blamed, notes)));
    }
    return parts;
  };

  // --- passes ---------------------------------------------------------------------------------------------------

  // A bar a pass, as long as its SQNR; what the pass has cost stands out at its end.
  const waterfall = () => {
    const levels = report.passes.map((record) => level(record.distance));
    const finite = levels.filter((value) => value !== null && Number.isFinite(value));
    const most = Math.max(60, ...finite) * 1.1;
    const clamp = (value) => Math.max(0, Math.min(most, value));
    const width = 260;
    let before = Infinity;
    return report.passes.map((record, index) => {
      const value = levels[index];
      if (value === null) return "";
      const [from, to] = [clamp(value), clamp(before)];
      before = value;
      const at = (db) => (width * db / most).toFixed(1);
      const kind = record.text === report.worst_pass ? "worst" : "lost";
      return s("svg", { width, height: 16, viewBox: `0 0 ${width} 16`, role: "img", "aria-label": sqnr(record.distance) },
        s("rect", { class: "kept", x: 0, y: 2, width: at(from), height: 12, rx: 2 }),
        to > from ? s("rect", { class: kind, x: at(from), y: 2, width: at(to - from), height: 12, rx: 2 }) : null);
    });
  };

  const passes = () => {
    const bars = waterfall();
    const places = new Map(report.passes.map((record, index) => [record, index]));
    const measured = report.passes.some((record) => record.distance);
    const columns = [
      { title: "#", number: true, value: (record) => places.get(record) + 1 },
      { title: "pass", name: true, value: (record) => record.text, show: (record) => h("code", {}, record.text) },
      { title: "changes", number: true, value: (record) => record.changes },
      { title: "weights", number: true, value: (record) => record.size.size_bytes, show: (record) => size(record.size.size_bytes) },
      { title: "zeros", number: true, value: (record) => record.size.weights ? record.size.zeros / record.size.weights : 0,
        show: (record) => percent(record.size.weights ? record.size.zeros / record.size.weights : 0) },
      ...(measured ? [
        { title: "SQNR", number: true, value: (record) => level(record.distance), show: (record) => sqnr(record.distance) },
        { title: "what is left of it, and what the pass cost", value: (record) => level(record.distance),
          show: (record) => bars[places.get(record)] }] : []),
      { title: "seconds", number: true, value: (record) => record.seconds, show: (record) => record.seconds.toFixed(2) },
      { title: "checks", number: true, value: (record) => record.check_seconds, show: (record) => record.check_seconds.toFixed(2) },
    ];
    const { table } = sortable(columns, report.passes, (record) => record.text === report.worst_pass ? "blamed" : null);
    const parts = [table];
    const remarks = report.passes.flatMap((record) => record.remarks);
    if (remarks.length) {
      const listed = sortable([
        { title: "pass", value: (remark) => remark.origin },
        { title: "where", name: true, value: (remark) => remark.module || remark.node },
        { title: "line", value: (remark) => remark.source },
        { title: "remark", name: true, value: (remark) => remark.reason },
      ], remarks);
      parts.push(h("h2", {}, "Remarks"), tools("Filter remarks", listed.filter, remarks.length), listed.table);
    }
    return parts;
  };

  const tools = (label, filter, count, ...more) => {
    const shown = h("span", { class: "dim" }, `${count} shown`);
    const input = h("input", { type: "search", placeholder: label, "aria-label": label,
      oninput: () => { shown.textContent = `${filter(input.value)} shown`; } });
    return h("div", { class: "tools" }, input, shown, more);
  };

  // --- layers -----------------------------------------------------------------------------------------------------

  const layers = () => {
    const rows = report.layers;
    const some = (name) => rows.some((row) => row[name] !== null && row[name] !== "" && row[name] !== undefined);
    const verdict = (row) => h("span", { class: row.verdict.startsWith("does not") ? "bad" : "good" }, row.verdict);
    const slowest = Math.max(...rows.map((row) => row.compiled_ns || 0), 1);
    const timing = (title, name) => ({ title, number: true, value: (row) => row[name], show: (row) => time(row[name]) });
    const columns = [
      { title: "layer", name: true, value: (row) => row.name, show: (row) => h("span", { title: row.place }, row.name) },
      { title: "kind", value: (row) => row.kind },
      { title: "shape", value: (row) => row.parameters, show: (row) => row.shape.join("×") },
      { title: "weight", value: (row) => row.weight },
      { title: "data", value: (row) => row.activation },
      { title: "zeros", number: true, value: (row) => row.sparsity, show: (row) => percent(row.sparsity) },
      { title: "size", number: true, value: (row) => row.size_bytes, show: (row) => size(row.size_bytes) },
      ...(some("distance") ? [
        { title: "SQNR", number: true, value: (row) => level(row.distance), show: (row) => sqnr(row.distance) }] : []),
      ...(some("loss") ? [{ title: "noise added", number: true, value: (row) => row.loss,
        show: (row) => row.loss === null ? "" : short(row.loss) }] : []),
      ...(some("form") ? [{ title: "runs as", value: (row) => row.form, show: (row) => h("span", { title: row.remark }, row.form) }] : []),
      ...(some("predicted_ns") ? [timing("predicted", "predicted_ns")] : []),
      ...(some("peak_share") ? [{ title: "of peak", number: true, value: (row) => row.peak_share,
        show: (row) => row.peak_share === null ? "" : percent(row.peak_share) }] : []),
      ...(some("compiled_ns") ? [
        { title: "measured", number: true, value: (row) => row.compiled_ns, show: (row) => row.compiled_ns === null ? "" :
          h("div", { class: "bar after" }, h("i", { style: `width: ${(6 * row.compiled_ns / slowest).toFixed(2)}rem` }), time(row.compiled_ns)) },
        timing("dense", "dense_ns"),
        { title: "verdict", value: (row) => row.verdict, show: verdict }] : []),
    ];
    const { table, filter } = sortable(columns, rows, (row) => row.name === report.worst_layer ? "blamed" : null);
    return [tools("Filter layers: a name, kind or format", filter, rows.length), table];
  };

  // --- weights ----------------------------------------------------------------------------------------------------

  const weights = () => {
    const drawn = [];
    const rows = new Map(report.layers.map((row) => [row.name, row]));
    const cards = Object.entries(report.weight_maps).map(([name, lines]) => {
      const canvas = h("canvas", { width: lines[0].length, height: lines.length, role: "img",
        "aria-label": `Where the weight of ${name} is zero` });
      drawn.push([canvas, lines]);
      const row = rows.get(name);
      return h("div", { class: "card" }, h("b", {}, name),
        h("div", { class: "note" }, row ? `${row.shape.join("×")}, ${percent(row.sparsity)} zeros` : ""), canvas);
    });
    // In the colours of the theme; a shade for each fifteenth that is kept.
    const draw = () => {
      const style = getComputedStyle(document.documentElement);
      const parse = (name) => style.getPropertyValue(name).trim().match(/[0-9a-f]{2}/gi).map((part) => parseInt(part, 16));
      const [none, all] = [parse("--hover"), parse("--blue")];
      for (const [canvas, lines] of drawn) {
        const context = canvas.getContext("2d");
        const image = context.createImageData(canvas.width, canvas.height);
        lines.forEach((line, y) => [...line].forEach((digit, x) => {
          const share = parseInt(digit, 16) / 15;
          const at = 4 * (y * canvas.width + x);
          for (let c = 0; c < 3; ++c) image.data[at + c] = Math.round(none[c] + share * (all[c] - none[c]));
          image.data[at + 3] = 255;
        }));
        context.putImageData(image, 0, 0);
      }
    };
    repaint.push(draw);
    return [h("p", { class: "dim" }, "Outputs from top to bottom, inputs from left to right. The darker, the more of the weights there are kept; pale places are zero."),
      h("div", { class: "many" }, cards)];
  };
  const repaint = [];

  // --- activations --------------------------------------------------------------------------------------------------

  const activations = () => {
    const cards = report.activations.map((item) => {
      const [width, height] = [300, 96];
      const most = Math.log1p(Math.max(...item.counts));
      const at = (value) => width * (value - item.low) / (item.high - item.low || 1);
      const step = width / item.counts.length;
      const bars = item.counts.map((count, index) => {
        const tall = most ? (height - 4) * Math.log1p(count) / most : 0;
        return s("rect", { class: "count", x: (index * step).toFixed(2), width: Math.max(step - 0.6, 0.5).toFixed(2),
          y: (height - tall).toFixed(2), height: tall.toFixed(2) });
      });
      const [left, right] = [Math.max(0, at(item.range_low)), Math.min(width, at(item.range_high))];
      const edge = (value) => value > item.low && value < item.high ?
        s("line", { class: "edge", x1: at(value), x2: at(value), y1: 0, y2: height }) : null;
      const picture = s("svg", { width, height: height + 16, viewBox: `0 0 ${width} ${height + 16}`, role: "img",
        "aria-label": `Values of ${item.name} and the range that is kept` },
        s("rect", { class: "range", x: left, width: Math.max(0, right - left), y: 0, height }), bars,
        edge(item.range_low), edge(item.range_high),
        s("line", { class: "axis", x1: 0, x2: width, y1: height, y2: height }),
        s("text", { x: 0, y: height + 13 }, short(item.low)),
        s("text", { x: width, y: height + 13, "text-anchor": "end" }, short(item.high)));
      return h("div", { class: "card" }, h("b", {}, item.name),
        h("div", { class: "note" }, `${item.format}, range ${short(item.range_low)} to ${short(item.range_high)}, ` +
          `${percent(item.clipped)} clipped`), picture);
    });
    return [h("p", { class: "dim" }, "Values on the check batch, counted on a logarithmic scale. The shaded range is what the integers reach; beyond the dashed lines values are clipped."),
      h("div", { class: "many" }, cards)];
  };

  // --- mixed precision ----------------------------------------------------------------------------------------------

  const chosenBy = () => report.passes.filter((record) => record.facts.sensitivity || record.facts.frontier);

  const heat = (facts) => {
    // An object gives keys that look like numbers first: the layers' own order is the report's.
    const order = report.layers.map((row) => row.name);
    const names = Object.keys(facts.sensitivity).sort((a, b) => order.indexOf(a) - order.indexOf(b));
    const formats = [...new Set(names.flatMap((name) => Object.keys(facts.sensitivity[name])))];
    const values = names.flatMap((name) => Object.values(facts.sensitivity[name])).filter((value) => value > 0);
    const [low, high] = [Math.log(Math.min(...values)), Math.log(Math.max(...values))];
    const strength = (value) => value > 0 ? (Math.log(value) - low) / (high - low || 1) : 0;
    const cell = (name, format) => {
      const value = facts.sensitivity[name][format];
      if (value === undefined) return h("td", { class: "dim" }, "–");
      return h("td", { class: facts.choice[name] === format ? "chosen" : null,
        style: `background: color-mix(in srgb, var(--red) ${(65 * strength(value)).toFixed(0)}%, var(--card))` }, short(value));
    };
    return h("div", { class: "scroll" }, h("table", { class: "heat" },
      h("thead", {}, h("tr", {}, h("th", {}, "layer"), formats.map((format) => h("th", { class: "number" }, format)))),
      h("tbody", {}, names.map((name) => h("tr", {}, h("td", { class: "name" }, name), formats.map((format) => cell(name, format)))))));
  };

  const frontier = (facts) => {
    const chosen = { cost: facts.cost, predicted: facts.predicted };
    const points = facts.frontier.filter((point) => point.predicted > 0);
    if (points.length < 2) return null;
    const [width, height, left, bottom] = [680, 300, 64, 36];
    const costs = [...points, chosen].map((point) => point.cost);
    const losses = [...points, chosen].map((point) => point.predicted).filter((value) => value > 0).map(Math.log10);
    const [x0, x1] = [Math.min(...costs), Math.max(...costs)];
    const [y0, y1] = [Math.floor(Math.min(...losses)), Math.ceil(Math.max(...losses))];
    const x = (cost) => left + (width - left - 16) * (cost - x0) / (x1 - x0 || 1);
    const y = (loss) => 10 + (height - bottom - 10) * (y1 - Math.log10(Math.max(loss, 10 ** y0))) / (y1 - y0 || 1);
    const powers = Array.from({ length: y1 - y0 + 1 }, (_, index) => y0 + index);
    const ticks = Array.from({ length: 6 }, (_, index) => x0 + (x1 - x0) * index / 5);
    const sorted = [...points].sort((a, b) => a.cost - b.cost);
    return h("div", { class: "box" }, s("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img",
      "aria-label": `Predicted ${facts.measure} against ${facts.unit}` },
      powers.map((power) => [s("line", { class: "axis", x1: left, x2: width - 16, y1: y(10 ** power), y2: y(10 ** power) }),
        s("text", { x: left - 8, y: y(10 ** power) + 4, "text-anchor": "end" }, `1e${power}`)]),
      ticks.map((tick) => s("text", { x: x(tick), y: height - bottom + 16, "text-anchor": "middle" }, short(tick))),
      s("text", { x: (left + width) / 2, y: height - 4, "text-anchor": "middle" }, facts.unit),
      s("path", { class: "path", d: sorted.map((point, index) => `${index ? "L" : "M"}${x(point.cost).toFixed(1)} ${y(point.predicted).toFixed(1)}`).join("") }),
      sorted.map((point) => s("circle", { class: "dot", cx: x(point.cost), cy: y(point.predicted), r: 2.5 },
        s("title", {}, `${short(point.cost)} ${facts.unit}: ${short(point.predicted)}`))),
      s("circle", { class: "chosen", cx: x(chosen.cost), cy: y(chosen.predicted), r: 6 },
        s("title", {}, `chosen: ${short(chosen.cost)} ${facts.unit}, ${short(chosen.predicted)}`))));
  };

  const precision = () => chosenBy().map(({ facts }) => [
    facts.sensitivity && Object.keys(facts.sensitivity).length ? [
      h("h2", {}, `What each format would do to each layer (${facts.measure})`),
      h("p", { class: "dim" }, "Redder is worse, on a logarithmic scale; the chosen format is framed."), heat(facts)] : null,
    facts.frontier && facts.frontier.length ? [
      h("h2", {}, `What each budget would have lost (predicted ${facts.measure})`),
      h("p", { class: "dim" }, "The large dot is what was chosen."), frontier(facts)] : null,
  ]);

  // --- graph --------------------------------------------------------------------------------------------------------

  // Lines are numbered, and nearly all are unique: those of both texts that keep their order are the longest
  // increasing sequence of their places.
  const matches = (before, after) => {
    const places = new Map(before.map((line, index) => [line, index]));
    const tails = [];
    const links = [];
    after.forEach((line, index) => {
      const place = places.get(line);
      if (place === undefined) return;
      let [low, high] = [0, tails.length];
      while (low < high) {
        const middle = (low + high) >> 1;
        if (links[tails[middle]].place < place) low = middle + 1;
        else high = middle;
      }
      links.push({ place, index, previous: low ? tails[low - 1] : -1 });
      tails[low] = links.length - 1;
    });
    const kept = [];
    for (let at = tails.length ? tails[tails.length - 1] : -1; at >= 0; at = links[at].previous) kept.push(links[at]);
    return kept.reverse();
  };

  const difference = (before, after) => {
    const lines = [];
    let [left, right] = [0, 0];
    for (const { place, index } of [...matches(before, after), { place: before.length, index: after.length }]) {
      for (; left < place; ++left) lines.push(["removed", before[left]]);
      for (; right < index; ++right) lines.push(["added", after[right]]);
      if (place < before.length) lines.push(["same", after[index]]);
      [left, right] = [place + 1, index + 1];
    }
    return lines;
  };

  const graph = () => {
    const { lines, stages } = report.graphs;
    const titles = stages.map((stage, index) => `${index}: ${stage.title}`);
    const choose = (label, selected) => h("select", { "aria-label": label, onchange: () => show() },
      titles.map((title, index) => h("option", { value: index, selected: index === selected ? "" : null }, title)));
    const last = stages.length - 1;
    const before = choose("before", Math.max(0, last - 1));
    const after = choose("after", last);
    const all = h("input", { type: "checkbox", id: "all-lines", onchange: () => show() });
    const count = h("span", { class: "dim" });
    const text = h("pre", { class: "diff", id: "diff" });
    const around = 3;
    const line = ([kind, number]) => h("div", { class: kind === "same" ? null : kind },
      `${kind === "added" ? "+" : kind === "removed" ? "-" : " "} ${lines[number]}`);
    const show = () => {
      const found = difference(stages[before.value].lines, stages[after.value].lines);
      const changed = found.map(([kind]) => kind !== "same");
      const tally = (kind) => found.filter(([other]) => other === kind).length;
      count.textContent = `${tally("added")} lines added, ${tally("removed")} removed`;
      text.replaceChildren();
      for (let at = 0; at < found.length;) {
        const near = changed.slice(Math.max(0, at - around), at + around + 1).some(Boolean);
        if (near || all.checked) {
          text.append(line(found[at++]));
          continue;
        }
        let end = at;
        while (end < found.length && !changed.slice(Math.max(0, end - around), end + around + 1).some(Boolean)) ++end;
        const hiddenLines = found.slice(at, end);
        const fold = h("button", { class: "fold", type: "button",
          onclick: () => fold.replaceWith(...hiddenLines.map(line)) }, `… ${hiddenLines.length} lines alike`);
        text.append(fold);
        at = end;
      }
    };
    show();
    return [h("div", { class: "tools" }, "from", before, "to", after,
      h("label", { for: "all-lines" }, all, " all lines"), count), h("div", { class: "scroll" }, text)];
  };

  // --- environment --------------------------------------------------------------------------------------------------

  const environment = () => {
    const rows = [["backend", `${report.backend} (${report.backend_reason})`], ...Object.entries(report.environment),
      ...Object.entries(report.seconds).map(([stage, seconds]) => [`time to ${stage}`, `${seconds.toFixed(2)} s`])];
    const parts = [h("div", { class: "scroll" }, h("table", {}, h("tbody", {},
      rows.map(([name, value]) => h("tr", {}, h("td", {}, name), h("td", {}, value))))))];
    if (report.recipe) parts.push(h("h2", {}, "Recipe"), h("div", { class: "box" }, h("pre", { id: "recipe" }, report.recipe)));
    return parts;
  };

  // --- the page -----------------------------------------------------------------------------------------------------

  const filled = (value) => value && Object.keys(value).length > 0;
  const sections = [
    ["overview", "Overview", true, overview],
    ["passes", "Passes", filled(report.passes), passes],
    ["layers", "Layers", filled(report.layers), layers],
    ["weights", "Sparsity", filled(report.weight_maps), weights],
    ["activations", "Activations", filled(report.activations), activations],
    ["precision", "Mixed precision", chosenBy().length > 0, precision],
    ["graph", "Graph", report.graphs && report.graphs.stages.length > 1, graph],
    ["environment", "Environment", true, environment],
  ].filter(([, , exists]) => exists);

  const tabs = document.getElementById("tabs");
  const panels = document.getElementById("panels");
  const open = (name) => {
    for (const tab of tabs.children) {
      const selected = tab.dataset.name === name;
      tab.setAttribute("aria-selected", selected);
      tab.tabIndex = selected ? 0 : -1;
    }
    for (const panel of panels.children) panel.hidden = panel.id !== name;
    history.replaceState(null, "", `#${name}`);
  };
  for (const [name, title, , build] of sections) {
    const tab = h("button", { type: "button", role: "tab", id: `tab-${name}`, "aria-controls": name, "data-name": name,
      onclick: () => open(name) }, title);
    tabs.append(tab);
    panels.append(h("section", { id: name, role: "tabpanel", "aria-labelledby": `tab-${name}`, hidden: "" }, build()));
  }
  tabs.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const all = [...tabs.children];
    const next = all[(all.indexOf(document.activeElement) + step + all.length) % all.length];
    open(next.dataset.name);
    next.focus();
  });

  const paint = (theme) => {
    document.documentElement.dataset.theme = theme;
    for (const draw of repaint) draw();
  };
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", () => paint(dark.matches ? "dark" : "light"));
  document.getElementById("theme").addEventListener("click", () =>
    paint(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  paint(dark.matches ? "dark" : "light");

  document.getElementById("title").textContent = report.model;
  document.getElementById("subtitle").textContent =
    `compiled for ${report.backend}${report.environment.cpu ? `, on ${report.environment.cpu}` : ""}`;
  document.getElementById("version").textContent = report.environment.sqcompile || "";
  const asked = location.hash.slice(1);
  open(sections.some(([name]) => name === asked) ? asked : "overview");
})();

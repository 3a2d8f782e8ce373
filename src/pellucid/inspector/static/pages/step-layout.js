/* Where the boxes and arrows of the step page's diagram lie: five columns where there is room, two where there is not. */
(() => {
  "use strict";
  const NARROW = 820; // px below which bands are stacked in two columns
  const LINE = 15, TITLE = 18, PAD = 8; // px: a line of facts, a title, the space inside a box
  const HEAD = 26, FOOT = 14; // px: a band's title, and the space below its last row

  let canvas = null;
  /** Width in px of a text in a CSS font. */
  function measure(text, font) {
    canvas ??= document.createElement("canvas").getContext("2d");
    canvas.font = font;
    return canvas.measureText(text).width;
  }
  function shortened(text, width, font) {
    if (measure(text, font) <= width) return text;
    let end = text.length - 1;
    while (end > 1 && measure(`${text.slice(0, end)}…`, font) > width) end -= 1;
    return `${text.slice(0, end)}…`;
  }
  /** Pieces in as few lines of `width` px as they need, `between` those on one line; a piece that no line holds is shortened. */
  function packed(pieces, width, font, between = "") {
    const lines = [];
    for (const piece of pieces) {
      const joined = lines.length ? lines[lines.length - 1] + between + piece : null;
      if (joined && measure(joined.trimEnd(), font) <= width) lines[lines.length - 1] = joined;
      else lines.push(piece);
    }
    return lines.map((line) => shortened(line.trim(), width, font));
  }
  /** A text in lines, broken after spaces, colons and underscores. */
  const broken = (text, width, font) => packed(text.match(/[^ _：]+[ _：]*/g) ?? [text], width, font);
  /** Facts side by side where they fit, " · " between them; one that is too long for a line is broken. */
  function factLines(facts, width, font) {
    const whole = facts.flatMap((fact) => (measure(fact, font) <= width ? [fact] : broken(fact, width, font)));
    return packed(whole, width, font, " · ");
  }

  function gridOf(width) {
    const narrow = width < NARROW;
    const grid = narrow ? { columns: 2, gap: 22, left: 10, right: 30, rowGap: 26, between: 34, top: 30 }
      : { columns: 5, gap: 24, left: 24, right: 56, rowGap: 44, between: 34, top: 34 };
    grid.narrow = narrow;
    grid.column = (width - grid.left - grid.right - (grid.columns - 1) * grid.gap) / grid.columns;
    grid.x = (column) => grid.left + column * (grid.column + grid.gap);
    return grid;
  }

  /** Boxes with x, y, width, height and lines; bands with theirs; rows are as high as their highest box. */
  function boxesOf(graph, grid, fonts) {
    const boxes = graph.nodes.map((node) => {
      const [row, column, span] = grid.narrow ? node.narrow : node.wide;
      const width = span * grid.column + (span - 1) * grid.gap;
      const room = width - 2 * PAD - (node.shape === "model" ? 6 : 0);
      const lines = factLines(node.facts, room, fonts.facts);
      const titles = broken(node.title, room - (node.shape === "data" ? 8 : 0), node.mono ? fonts.mono : fonts.title);
      return { node, row, column, x: grid.x(column), width, lines, titles };
    });
    const bands = [];
    let y = grid.top;
    for (const band of graph.bands) {
      const inside = boxes.filter((box) => box.node.band === band.id);
      const placed = { ...band, x: grid.left - 10, y, width: grid.x(grid.columns) - grid.gap - grid.left + 20 };
      y += HEAD + (grid.narrow ? 0 : 14); // room for the words on arrows
      for (const row of [...new Set(inside.map((box) => box.row))].sort((a, b) => a - b)) {
        const across = inside.filter((box) => box.row === row);
        const height = Math.max(...across.map((box) => 2 * PAD + TITLE * box.titles.length + LINE * box.lines.length));
        for (const box of across) Object.assign(box, { y, height });
        y += height + grid.rowGap;
      }
      y += FOOT - grid.rowGap;
      placed.height = y - placed.y;
      bands.push(placed);
      y += grid.between;
    }
    return { boxes, bands, height: y - grid.between + 8 };
  }

  // ------------------------------------------------------------------ arrows: straight lines along the gaps between boxes
  const middle = (box) => box.x + box.width / 2;
  const centre = (box) => box.y + box.height / 2;

  function route(edge, from, to, grid, buffer, width) {
    const tx = middle(to) + (edge.shift ?? 0);
    const lane = width - 12 - 20 * (edge.lane ?? 0);
    if (edge.way === "home") {
      const x = tx - 24;
      const y = to.y - HEAD - (grid.narrow ? 12 : 28);
      return { points: [[from.x + from.width, centre(from)], [lane, centre(from)], [lane, y], [x, y], [x, to.y]], at: [lane - 8, y - 5, "end"] };
    }
    if (edge.way === "back") return { points: [[from.x + from.width, centre(from)], [lane, centre(from)], [lane, centre(to)], [to.x + to.width, centre(to)]] };
    if (edge.way === "up") return { points: [[from.x + from.width, centre(from)], [tx, centre(from)], [tx, to.y + to.height]] };
    const isBeside = from && from.row === to.row;
    if (edge.way === "over" && isBeside) {
      const y = from.y - 13;
      return { points: [[middle(from) + 24, from.y], [middle(from) + 24, y], [tx, y], [tx, to.y]] };
    }
    if (isBeside) return { points: [[from.x + from.width, centre(from)], [to.x, centre(to)]] };
    const above = to.y - 20; // where an arrow turns towards its box
    const gapX = typeof edge.gap === "number" ? (edge.gap < 0 ? grid.left - 17 : grid.x(edge.gap + 1) - grid.gap / 2) : null;
    const label = [tx + 6, to.y - 7, "start"];
    if (!from) {
      const start = buffer.y + buffer.height;
      return { points: gapX === null ? [[tx, start], [tx, to.y]] : [[gapX < grid.left ? gapX + 12 : gapX, start], ...(gapX < grid.left ? [[gapX + 12, start + 8], [gapX, start + 8]] : []), [gapX, above], [tx, above], [tx, to.y]], at: label };
    }
    const sx = middle(from);
    const bottom = from.y + from.height;
    if (gapX !== null) return { points: [[sx, bottom], [sx, bottom + 14], [gapX, bottom + 14], [gapX, above], [tx, above], [tx, to.y]], at: label };
    if (sx === tx) return { points: [[sx, bottom], [tx, to.y]], at: label };
    const turn = to.row - from.row > 1 || from.node.band !== to.node.band ? bottom + FOOT + 12 : above;
    return { points: [[sx, bottom], [sx, turn], [tx, turn], [tx, to.y]], at: label };
  }

  function arrowsOf(graph, boxes, bands, grid, width) {
    const byId = Object.fromEntries(boxes.map((box) => [box.node.id, box]));
    const buffer = bands.find((band) => band.id === "buffer");
    const wanted = graph.edges.filter((edge) => (grid.narrow ? edge.narrow : edge.from !== "buffer" || buffer));
    const arrows = wanted.map((edge) => ({ key: `${edge.from}>${edge.to}`, from: edge.from, label: edge.label || "", ...route(edge, byId[edge.from], byId[edge.to], grid, buffer, width) }));
    return grid.narrow ? [...arrows, ...betweenBands(bands)] : arrows;
  }
  /** In two columns the arrows from box to box would cross everything; what flows from band to band is drawn instead. */
  function betweenBands(bands) {
    const flows = { forward: "step.flows.all", buffer: "step.flows.results", learning: "step.flows.minibatches" };
    return bands.slice(1).map((band, i) => {
      const x = band.x + band.width / 2;
      const above = bands[i].y + bands[i].height;
      return { key: `band ${band.id}`, from: `band ${band.id}`, heavy: true, label: Pellucid.t(flows[band.id]), points: [[x, above + 2], [x, band.y - 1]], at: [x + 10, (above + band.y) / 2 + 4, "start"] };
    });
  }

  /** Everything with its place, in px. width: of the container; fonts: {title, mono, facts} as CSS fonts. */
  function stepLayout(graph, width, fonts) {
    const grid = gridOf(width);
    const { boxes, bands, height } = boxesOf(graph, grid, fonts);
    return { narrow: grid.narrow, width, height, boxes, bands, arrows: arrowsOf(graph, boxes, bands, grid, width) };
  }

  Object.assign(Pellucid, { stepLayout, stepMeasure: measure });
})();

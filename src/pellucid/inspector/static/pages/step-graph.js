/* The step page's diagram as a graph: which boxes and arrows a manifest gives rise to. What the record does not hold is not drawn. */
(() => {
  "use strict";
  const { t, format, seconds, bytes, stepFacts } = Pellucid;
  const percent = (share) => `${format(Number((100 * share).toPrecision(3)))} %`;
  const millions = (n) => (n >= 1e6 ? `${format(Number((n / 1e6).toPrecision(3)))} M` : format(n));
  const isNumber = (x) => typeof x === "number" && Number.isFinite(x);

  /** A tensor's figures, as short texts. */
  function tensorFacts(tensor) {
    const facts = [];
    if (tensor.dtype === "bool") { if (isNumber(tensor.mean)) facts.push(t("step.fact.share", percent(tensor.mean))); }
    else if (isNumber(tensor.mean)) {
      facts.push(isNumber(tensor.std) ? t("step.fact.stats", format(tensor.mean), format(tensor.std)) : t("step.fact.mean", format(tensor.mean)));
    }
    if (tensor.shape) facts.push(`${tensor.shape.join(" × ")} ${tensor.dtype ?? ""}`);
    if (isNumber(tensor.bytes)) facts.push(bytes(tensor.bytes));
    if (tensor.producer) facts.push(tensor.producer);
    if (isNumber(tensor.weight_version)) facts.push(t("step.fact.weights", tensor.weight_version));
    return facts;
  }

  /** What the record says of one step, looked up by name. */
  function stepIndex(manifest, spans, config) {
    const tensors = Object.fromEntries((manifest.tensors ?? []).map((tensor, order) => [tensor.name, { ...tensor, order: order + 1 }]));
    const weights = Object.fromEntries((manifest.weights ?? []).map((w) => [w.role, w]));
    const [copied, reward] = [stepFacts.areCopied(tensors), stepFacts.rewardKind(manifest, config)];
    spans = (spans ?? []).filter((span) => isNumber(span.start) && isNumber(span.seconds)) // a cut file may end in half a span
      .map((span) => stepFacts.asItWas(span, copied, reward));
    const phases = stepFacts.phasesOf(spans);
    return {
      manifest, tensors, weights, phases, config, algorithm: manifest.algorithm ?? {}, metrics: manifest.metrics ?? {},
      phase: (name) => phases.find((p) => p.phase === name),
      copied, reward, spans,
    };
  }

  function phaseFacts(index, name, counts = true) {
    const phase = index.phase(name);
    if (!phase) return [];
    return [seconds(phase.seconds), ...(counts && phase.tokens ? [t("step.fact.tokens", format(phase.tokens))] : []),
      ...(counts && phase.rate ? [t("step.fact.rate", format(Math.round(phase.rate)))] : [])];
  }
  function modelFacts(index, role, phase, tensor) {
    const weights = index.weights[role];
    const version = index.tensors[tensor]?.weight_version;
    return [...(isNumber(version) ? [t("step.fact.weights", version)] : []), ...phaseFacts(index, phase),
      ...(isNumber(weights?.parameters) ? [t("step.fact.parameters", millions(weights.parameters))] : []), ...(weights?.precision ? [weights.precision] : [])];
  }
  const metricFacts = (index, names) => names.filter((name) => isNumber(index.metrics[name])).map((name) => `${name.split("/")[1]} ${format(index.metrics[name])}`);

  // ------------------------------------------------------------------ boxes, band by band
  // wide, narrow: [row, column, columns] on grids of 5 and of 2 columns.
  function dataNode(index, name, place, more = []) {
    const lead = index.tensors[name];
    if (!lead) return null;
    const tensors = [name, ...more].filter((other) => index.tensors[other]);
    return { id: name, shape: "data", title: name, mono: true, tensors, facts: tensorFacts(lead), ...place };
  }

  function rolloutNodes(index) {
    const { tensors, manifest, config } = index;
    const each = config?.rollout?.samples_per_prompt;
    const prompts = each && isNumber(manifest.samples) ? manifest.samples / each : null;
    const parts = ["input_ids", "attention_mask", "position_ids", "response_mask", "action_mask", "ended", "bootstrap_values", "group_ids", "policy_version"];
    const sequences = parts.filter((name) => tensors[name]);
    const produced = sequences.length || tensors.rollout_logprobs || index.phase("generate");
    return [
      { id: "prompts", shape: "data", band: "rollout", wide: [0, 0, 1], narrow: [0, 0, 1],
        facts: [...(prompts ? [t("step.fact.count", format(prompts))] : []), ...(each > 1 ? [t("step.fact.each", each)] : [])] },
      produced && { id: "sampler", shape: "model", role: "actor", phases: ["generate"], band: "rollout", wide: [0, 1, 1], narrow: [0, 1, 1],
        facts: modelFacts(index, "actor", "generate", sequences[0] ?? "rollout_logprobs") },
      dataNode(index, "rollout_logprobs", { band: "rollout", wide: [0, 2, 1], narrow: [1, 0, 1] }),
      sequences.length && { id: "sequences", shape: "data", tensors: sequences, band: "rollout", wide: [0, 3, 2], narrow: [1, 1, 1],
        facts: [...(isNumber(manifest.samples) ? [t("step.fact.samples", format(manifest.samples))] : []), ...tensorFacts(tensors[sequences[0]])] },
    ];
  }

  function actorPass(index, place) {
    const alternatives = index.tensors.top_logprobs ?? index.tensors.top_ids;
    if (!index.copied && (index.tensors.old_logprobs || index.phase("old_logprobs"))) {
      return { id: "actor", shape: "model", role: "actor", phases: ["old_logprobs", "alternatives"], facts: modelFacts(index, "actor", "old_logprobs", "old_logprobs"), ...place };
    }
    if (alternatives && (alternatives.producer ?? "").startsWith("actor")) {
      return { id: "actor", about: "alternatives", shape: "model", role: "actor", phases: ["alternatives"], tensors: ["top_ids", "top_logprobs"],
        facts: modelFacts(index, "actor", "alternatives", alternatives.name), ...place };
    }
    return index.copied && { id: "noActor", shape: "absent", facts: [t("step.fact.enginesLogprobs")], ...place };
  }
  function forwardNodes(index) {
    const { tensors, algorithm } = index;
    const band = "forward";
    const ran = (name, phase) => tensors[name] || index.phase(phase);
    const critic = { band, wide: [1, 4, 1], narrow: [3, 1, 1] };
    return [
      actorPass(index, { band, wide: [1, 1, 1], narrow: [2, 0, 1] }),
      ran("ref_logprobs", "ref_logprobs") && { id: "reference", shape: "model", role: "reference", phases: ["ref_logprobs"], band, wide: [1, 2, 1], narrow: [2, 1, 1],
        facts: modelFacts(index, "reference", "ref_logprobs", "ref_logprobs") },
      ran("scores", "score") && { id: index.reward, shape: index.reward === "function" ? "function" : "model", role: "reward", phases: ["score"], band, wide: [1, 3, 1], narrow: [3, 0, 1],
        facts: index.reward === "reward" ? modelFacts(index, "reward", "score", "scores") : phaseFacts(index, "score", false) },
      ran("old_values", "values") ? { id: "critic", shape: "model", role: "critic", phases: ["values"], facts: modelFacts(index, "critic", "values", "old_values"), ...critic }
        : algorithm.advantage && algorithm.advantage !== "gae" && { id: "noCritic", shape: "absent", facts: [`advantage = ${algorithm.advantage}`], ...critic },
    ];
  }

  function bufferNodes(index) {
    const band = "buffer";
    const before = ["old_logprobs", "alternatives"];
    const beside = ["entropy", "top_ids", "top_logprobs"].filter((name) => before.includes(index.tensors[name]?.phase));
    return [
      index.tensors.input_ids && { id: "kept", shape: "data", sameAs: "sequences", tensors: ["input_ids", "action_mask"].filter((name) => index.tensors[name]), band, wide: [2, 0, 1], narrow: [4, 0, 2],
        facts: isNumber(index.manifest.samples) ? [t("step.fact.samples", format(index.manifest.samples))] : [] },
      dataNode(index, "old_logprobs", { band, wide: [2, 1, 1], narrow: [5, 0, 1] }, beside),
      dataNode(index, "ref_logprobs", { band, wide: [2, 2, 1], narrow: [5, 1, 1] }),
      dataNode(index, "scores", { band, wide: [2, 3, 1], narrow: [6, 0, 1] }),
      dataNode(index, "old_values", { band, wide: [2, 4, 1], narrow: [6, 1, 1] }),
      dataNode(index, "kl", { band, wide: [3, 1, 1], narrow: [7, 0, 1] }),
      dataNode(index, "rewards", { band, wide: [3, 2, 1], narrow: [7, 1, 1] }),
      dataNode(index, "advantages", { band, wide: [3, 3, 1], narrow: [8, 0, 1] }),
      dataNode(index, "returns", { band, wide: [3, 4, 1], narrow: [8, 1, 1] }),
    ];
  }

  /** One learner's chain: model, its output, loss, gradient, new weights; wide row `row`, narrow rows from `below`. */
  function learner(index, role, row, below, chain) {
    const { weights } = index;
    const { id, phase, output, more, loss, gradient, fresh, lossFacts, formula, updateFacts } = chain;
    if (!index.tensors[output] && !index.phase(phase)) return [];
    const band = "learning";
    const made = weights[role];
    const node = (name, column, narrow) => dataNode(index, name, { band, wide: [row, column, 1], narrow: [below + narrow[0], narrow[1], 1] }, name === output ? more : []);
    return [
      { id, shape: "model", role, phases: [phase], band, wide: [row, 0, 1], narrow: [below, 0, 1], facts: [...phaseFacts(index, phase), ...updateFacts] },
      node(output, 1, [0, 1]),
      { id: loss, shape: "op", band, wide: [row, 2, 1], narrow: [below + 1, 0, 1], facts: lossFacts, formula, tensors: [role === "actor" ? "clipped" : "value_clipped"].filter((name) => index.tensors[name]),
        metrics: Object.keys(index.metrics).filter((name) => name.startsWith(`${role}/`)) },
      node(gradient, 3, [1, 1]),
      { id: fresh, shape: "model", role, band, wide: [row, 4, 1], narrow: [below + 2, 0, 2], showsWeights: true, phases: role === "actor" ? ["sync_weights"] : [],
        facts: [...(isNumber(made?.version) ? [t("step.fact.version", made.version)] : []), ...(made?.hash ? [made.hash.slice(0, 8)] : []),
          ...(isNumber(made?.bytes) ? [bytes(made.bytes)] : [])] },
    ];
  }
  function learningNodes(index) {
    const { algorithm: a } = index;
    const entropyLater = index.tensors.entropy?.phase === "update_actor" ? ["entropy"] : [];
    const schedule = [...(a.num_epochs ? [t("step.fact.epochs", a.num_epochs)] : []), ...(a.minibatch_size ? [t("step.fact.minibatch", a.minibatch_size)] : [])];
    const critic = learner(index, "critic", 4, 9, { id: "criticUpdate", phase: "update_critic", output: "values", more: ["critic_denominator"], loss: "valueLoss", gradient: "value_grads", fresh: "newCritic",
      formula: stepFacts.valueLoss(a), updateFacts: schedule, lossFacts: metricFacts(index, ["critic/value_loss", "critic/clip_fraction"]) });
    const row = critic.length ? 5 : 4;
    const actor = learner(index, "actor", row, 12, { id: "actorUpdate", phase: "update_actor", output: "ratio", more: ["log_ratio", "logprobs", "minibatch", "actor_denominator", ...entropyLater],
      loss: "policyLoss", gradient: "logprob_grads", fresh: "newActor", formula: stepFacts.policyLoss(a), updateFacts: schedule,
      lossFacts: metricFacts(index, ["actor/policy_loss", "actor/clip_fraction", ...(a.kl_in === "loss" ? ["actor/kl_loss"] : [])]) });
    const ptx = a.ptx_coef > 0 && actor.length ? [
      { id: "ptxData", shape: "data", band: "learning", wide: [row + 1, 0, 1], narrow: [15, 0, 1], facts: [] },
      { id: "ptxLoss", shape: "op", band: "learning", wide: [row + 1, 2, 1], narrow: [15, 1, 1], formula: [`ptx_loss = mean(−logprobs)`, `+ ${format(a.ptx_coef)} · ptx_loss`], metrics: ["actor/ptx_loss"],
        facts: metricFacts(index, ["actor/ptx_loss"]) },
    ] : [];
    return [...critic, ...actor, ...ptx];
  }

  // ------------------------------------------------------------------ arrows
  /** from, to: ids, or "buffer" for the band. gap: the column gap (0 left of column 1, −1 left of all) it goes down in. */
  function edgesOf(index, has) {
    const a = index.algorithm;
    const inReward = a.kl_in !== "loss" && a.kl_coef !== 0;
    const critic = has("criticUpdate");
    const sync = index.phase("sync_weights");
    const version = index.weights.actor?.version;
    const edges = [
      { from: "prompts", to: "sampler", narrow: true },
      { from: "sampler", to: "rollout_logprobs", way: "right" },
      { from: "sampler", to: "sequences", way: "over", narrow: true },
      ...["actor", "reference", index.reward, "critic", "kept"].map((to) => ({ from: "sequences", to, shift: to === "kept" ? 60 : 0, label: to === "reference" && t("step.flows.all") })),
      index.copied && { from: "rollout_logprobs", to: "old_logprobs", gap: 1, label: t("step.flows.copied") },
      !index.copied && { from: "actor", to: "old_logprobs" },
      { from: "reference", to: "ref_logprobs" }, { from: index.reward, to: "scores" }, { from: "critic", to: "old_values" },
      { from: "old_logprobs", to: "kl" }, { from: "ref_logprobs", to: "kl", shift: 24 },
      inReward && { from: "kl", to: "rewards", narrow: true }, { from: "scores", to: "rewards", shift: 24 },
      { from: "rewards", to: "advantages" }, { from: "old_values", to: "advantages", shift: 24 },
      { from: "advantages", to: "returns", narrow: true }, { from: "old_values", to: "returns" },
      { from: "buffer", to: "criticUpdate", label: t("step.node.sequences") },
      { from: "buffer", to: "valueLoss", label: "returns, old_values" },
      { from: "buffer", to: "actorUpdate", gap: critic ? -1 : null, label: t("step.node.sequences") },
      { from: "buffer", to: "ratio", gap: critic ? 0 : null, label: "old_logprobs" },
      { from: "buffer", to: "policyLoss", gap: critic ? 1 : null, label: a.kl_in === "loss" && a.kl_coef > 0 ? "advantages, ref_logprobs" : "advantages" },
      ...[["criticUpdate", "values", "valueLoss", "value_grads", "newCritic"], ["actorUpdate", "ratio", "policyLoss", "logprob_grads", "newActor"]]
        .flatMap((chain) => chain.slice(1).map((to, i) => ({ from: chain[i], to, way: "right", narrow: i === 0 || i === 2 }))),
      { from: "ptxData", to: "ptxLoss", way: "right", narrow: true }, { from: "ptxLoss", to: "newActor", way: "up" },
      { from: "newCritic", to: "critic", way: "back", lane: 1 },
      { from: "newActor", to: "sampler", way: "home", lane: 0, narrow: true,
        label: isNumber(version) && (sync ? t("step.flows.syncTimed", version, seconds(sync.seconds)) : t("step.flows.sync", version)) },
    ];
    return edges.filter((edge) => edge && has(edge.to) && (edge.from === "buffer" || has(edge.from)));
  }

  const HOW = { rollout: "step.kind.token by token", forward: "step.band.forward.how" };
  /** {nodes, edges, bands} of a step. */
  function stepGraph(index) {
    const nodes = [rolloutNodes, forwardNodes, bufferNodes, learningNodes].flatMap((make) => make(index)).filter(Boolean);
    for (const node of nodes) node.title ??= t(`step.node.${node.sameAs ?? node.id}`);
    const known = new Set(nodes.map((node) => node.id));
    const a = index.algorithm;
    const steps = a.minibatch_size && isNumber(index.manifest.samples) ? Math.ceil(index.manifest.samples / a.minibatch_size) : null;
    const bands = ["rollout", "forward", "buffer", "learning"].filter((id) => nodes.some((node) => node.band === id)).map((id) => ({
      id, title: t(`step.band.${id}`),
      how: Object.hasOwn(HOW, id) ? t(HOW[id]) : id === "learning" && a.num_epochs && steps ? t("step.band.learning.how", a.num_epochs, steps) : "",
    }));
    return { nodes, edges: edgesOf(index, (id) => known.has(id)), bands };
  }

  Object.assign(Pellucid, { stepIndex, stepGraph, tensorFacts });
})();

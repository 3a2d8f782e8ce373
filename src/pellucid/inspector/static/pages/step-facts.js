/* What the step page knows of tensors, phases and losses; pure functions over the payload, without a page. */
(() => {
  "use strict";
  const { format } = Pellucid;
  const LOGPROB = (a) => (a.temperature === undefined || a.temperature === 1 ? "log_softmax(logits)[token]" : `log_softmax(logits / ${format(a.temperature)})[token]`);
  const kept = (x) => (x === null || x === undefined ? "?" : format(x));

  /** How scores become advantages; a: manifest.algorithm. Lines of text. */
  const ADVANTAGES = {
    gae: (a) => [
      "δ[t] = rewards[t] + γ · old_values[t+1] − old_values[t]", "A[t] = δ[t] + γ · λ · A[t+1]",
      a.whiten_advantages ? "advantages = (A − mean) / √(variance + 1e−8)" : "advantages = A",
      `γ = ${kept(a.gamma)}, λ = ${kept(a.gae_lambda)}`,
    ],
    reinforce_pp: (a) => ["A[t] = rewards[t] + γ · A[t+1]", "advantages = (A − mean) / √(variance + 1e−8)", `γ = ${kept(a.gamma)}`],
    reinforce_pp_baseline: () => ["A = Σ rewards − mean_group(Σ rewards)", "advantages = (A − mean) / √(variance + 1e−8)"],
    rloo: () => ["advantages = Σ rewards − mean_others(Σ rewards)"],
    grpo: (a) => [`advantages = (Σ rewards − mean_group(Σ rewards)) / (std_group(Σ rewards) + ${kept(a.grpo_eps)})`],
    dr_grpo: () => ["advantages = Σ rewards − mean_group(Σ rewards)"],
  };
  const bounds = (a) => `${kept(1 - a.clip_eps_low)}, ${kept(1 + a.clip_eps_high)}`;
  const POLICY_LOSSES = {
    ppo: (a) => [
      `loss[t] = max(−ratio · A, −clip(ratio, ${bounds(a)}) · A)`,
      ...(a.dual_clip ? [`A[t] < 0: min(loss[t], −${format(a.dual_clip)} · A)`] : []),
    ],
    gspo: (a) => ["s = exp(mean_t(log_ratio[t]))", `loss[t] = max(−s · A, −clip(s, ${bounds(a)}) · A)`],
    cispo: (a) => [`loss[t] = −sg(clip(ratio, ${bounds(a)})) · A · logprobs[t]`],
  };
  const KL_LOSSES = {
    k1: "l", k2: "l² / 2", k3: "exp(−l) − 1 + l", k3_corrected: "(exp(−l) − 1 + l) · π / sg(π)",
  };

  /** The policy loss as it was configured, lines of text. */
  function policyLoss(a) {
    const lines = POLICY_LOSSES[a.policy_loss]?.(a) ?? [];
    const inLoss = a.kl_in === "loss" && a.kl_coef > 0;
    return [...lines, ...(inLoss ? [`+ ${format(a.kl_coef)} · ${KL_LOSSES[a.kl_loss] ?? a.kl_loss}, l = logprobs − ref_logprobs`] : []),
      ...(a.ptx_coef > 0 ? [`+ ${format(a.ptx_coef)} · ptx_loss`] : [])];
  }
  function valueLoss(a) {
    if (!a.value_clip_eps) return ["loss[t] = ½ (values − returns)²"];
    return ["loss[t] = ½ max((values − returns)², (V − returns)²)", `V = clip(values, old_values ± ${format(a.value_clip_eps)})`];
  }

  /** name -> {formula: algorithm -> lines, sort: the column of samples.json that is related}. */
  const TENSORS = {
    input_ids: { sort: "length" },
    attention_mask: { sort: "length" },
    response_mask: { sort: "length" },
    action_mask: { sort: "length" },
    ended: { sort: "length" },
    rollout_logprobs: { formula: (a) => [LOGPROB(a)], sort: "entropy_mean" },
    old_logprobs: { formula: (a, copied) => [copied ? "old_logprobs = rollout_logprobs" : LOGPROB(a)], sort: "kl_sequence" },
    entropy: { formula: () => ["entropy[t] = −Σ_v p(v) · log p(v)"], sort: "entropy_mean" },
    top_logprobs: { sort: "entropy_mean" },
    ref_logprobs: { formula: (a) => [LOGPROB(a)], sort: "kl_sequence" },
    old_values: { sort: "reward_sum" },
    scores: { sort: "scores" },
    kl: { formula: () => ["kl[t] = old_logprobs[t] − ref_logprobs[t]"], sort: "kl_sequence" },
    rewards: {
      formula: (a) => [a.kl_in === "loss" || a.kl_coef === 0 ? "rewards[t] = [t = last] · scores" : `rewards[t] = −${kept(a.kl_coef)} · kl[t] + [t = last] · scores`],
      sort: "reward_sum",
    },
    advantages: { formula: (a) => ADVANTAGES[a.advantage]?.(a) ?? [], sort: "advantage_mean" },
    returns: { formula: () => ["returns[t] = A[t] + old_values[t]"], sort: "reward_sum" },
    values: { sort: "reward_sum" },
    value_clipped: { formula: valueLoss, sort: "reward_sum" },
    value_grads: { formula: () => ["∂ value loss / ∂ values[t]"], sort: "reward_sum" },
    logprobs: { formula: (a) => [LOGPROB(a)], sort: "clipped_share" },
    log_ratio: { formula: () => ["log_ratio[t] = logprobs[t] − old_logprobs[t]"], sort: "clipped_share" },
    ratio: { formula: () => ["ratio[t] = exp(log_ratio[t])"], sort: "clipped_share" },
    clipped: { formula: (a) => POLICY_LOSSES[a.policy_loss]?.(a) ?? [], sort: "clipped_share" },
    logprob_grads: { formula: () => ["∂ actor loss / ∂ logprobs[t]"], sort: "clipped_share" },
  };

  /** [{phase, role, kind, ranks, start, seconds, tokens, rate}] in order of start. Ranks work side by side, so a phase lasts as
   * long as its slowest rank, and its tokens are those of all ranks. tokens and rate are null where no span counts any. */
  function phasesOf(spans) {
    const found = new Map();
    for (const span of spans) {
      const key = `${span.name}\n${span.role}`;
      if (!found.has(key)) found.set(key, { phase: span.name, role: span.role, kind: span.kind, start: span.start, tokens: null, ranks: new Map() });
      const phase = found.get(key);
      phase.start = Math.min(phase.start, span.start);
      phase.ranks.set(span.rank, (phase.ranks.get(span.rank) ?? 0) + span.seconds);
      if (span.tokens > 0) phase.tokens = (phase.tokens ?? 0) + span.tokens;
    }
    const phases = [...found.values()].sort((x, y) => x.start - y.start);
    for (const phase of phases) {
      phase.seconds = Math.max(...phase.ranks.values());
      phase.rate = phase.tokens && phase.seconds > 0 ? phase.tokens / phase.seconds : null;
    }
    return phases;
  }

  /** {whole, covered}: seconds from the first span's start to the last one's end, and those in which anything ran. */
  function coverage(spans) {
    const ordered = [...spans].sort((x, y) => x.start - y.start);
    if (!ordered.length) return { whole: 0, covered: 0 };
    let covered = 0, end = ordered[0].start;
    for (const { start, seconds } of ordered) {
      covered += Math.max(0, start + seconds - Math.max(start, end));
      end = Math.max(end, start + seconds);
    }
    return { whole: end - ordered[0].start, covered };
  }

  /** true: the old log-probs are the engine's, so the actor made no pass for them. */
  const areCopied = (tensors) => (tensors.old_logprobs?.producer ?? "").startsWith("rollout");
  /** "reward" (a model), "function", or "source" where the record does not say. */
  function rewardKind(manifest, config) {
    if ((manifest.weights ?? []).some((w) => w.role === "reward")) return "reward";
    if (config?.reward?.function || manifest.weights?.length) return "function";
    return config?.models?.reward ? "reward" : "source";
  }

  /** A span without the pass that was not made: the phase copied log-probs, or a function gave the scores, so no model went over tokens. */
  function asItWas(span, copied, reward) {
    const isNoPass = (copied && span.name === "old_logprobs") || (reward === "function" && span.name === "score");
    return isNoPass ? { ...span, kind: "driver", tokens: null } : span;
  }

  /** {generation, once, roles}: tokens per second of generation and of the models' forward passes, or null where either is unknown. */
  function comparison(phases) {
    const counts = (p) => p.tokens > 0 && p.seconds > 0;
    const generation = phases.find((p) => p.phase === "generate" && counts(p));
    const once = phases.filter((p) => p.kind === "all at once" && counts(p));
    if (!generation || !once.length) return null;
    const sum = (field) => once.reduce((total, p) => total + p[field], 0);
    return { generation: generation.rate, once: sum("tokens") / sum("seconds"), roles: [...new Set(once.map((p) => p.role))] };
  }

  Pellucid.stepFacts = { TENSORS, policyLoss, valueLoss, phasesOf, coverage, areCopied, asItWas, rewardKind, comparison };
})();

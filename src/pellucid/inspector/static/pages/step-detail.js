/* The detail of one box of the step page's diagram: what it is, its formula, its distribution, every field of the manifest. */
(() => {
  "use strict";
  const { html, t, format, seconds, bytes, stepFacts } = Pellucid;
  const { TENSORS } = stepFacts;

  const Fields = ({ rows }) => html`<dl class="step-fields">${rows.filter(([, value]) => value !== null && value !== undefined && value !== "")
    .map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>`;
  const field = (name) => t(`step.field.${name}`);

  function tensorRows(tensor) {
    const figure = (x) => (x === null || x === undefined ? null : format(x));
    return [
      [field("order"), figure(tensor.order)],
      [field("producer"), tensor.producer], [field("phase"), tensor.phase], [field("version"), figure(tensor.weight_version)], [field("epoch"), figure(tensor.epoch)],
      [field("dtype"), tensor.dtype], [field("shape"), tensor.shape?.join(" × ")], [field("bytes"), typeof tensor.bytes === "number" ? `${bytes(tensor.bytes)} (${format(tensor.bytes)})` : null],
      [field("count"), figure(tensor.count)], [field("mean"), figure(tensor.mean)], [field("std"), figure(tensor.std)], [field("min"), figure(tensor.min)], [field("max"), figure(tensor.max)],
      [field("hash"), tensor.hash && html`<code>${tensor.hash}</code>`],
    ];
  }

  const Formula = ({ lines }) => (lines?.length ? html`<pre class="step-formula">${lines.join("\n")}</pre>` : null);

  /** Everything about one tensor. `place`: {run, step} for the link to its samples. */
  function TensorDetail({ name, index, place }) {
    const tensor = index.tensors[name];
    const { formula, sort } = TENSORS[name] ?? {};
    const about = Pellucid.glossary[name]?.text;
    const { whitening } = index.manifest;
    const over = tensor.shape?.length === 1 ? t("step.detail.overSamples") : t("step.detail.overTokens");
    return html`${about && html`<p>${about}</p>`}
      <${Formula} lines=${formula?.(index.algorithm, index.copied)} />
      ${tensor.histogram ? html`<${Pellucid.Bars} histogram=${tensor.histogram} label=${`${name}, ${over}`} height=${72} />`
        : html`<p class="muted">${t("step.detail.noDistribution")}</p>`}
      ${name === "advantages" && whitening && html`<p>${t(index.algorithm.advantage === "reinforce_pp_baseline" ? "step.detail.whiteningSamples" : "step.detail.whitening", format(whitening.mean), format(whitening.variance))}</p>`}
      <${Fields} rows=${tensorRows(tensor)} />
      ${sort && html`<p><a href=${Pellucid.link({ ...place, page: "samples", query: { sort: `-${sort}` } })}>${t("step.detail.samples", t(`step.sort.${sort}`))}</a></p>`}`;
  }

  function PhaseDetail({ phase }) {
    return html`<h3><code>${phase.phase}</code></h3><${Fields} rows=${[
      [field("kind"), Pellucid.kindText(phase.kind)], [field("seconds"), seconds(phase.seconds)],
      [field("tokens"), phase.tokens && format(phase.tokens)], [field("rate"), phase.rate && format(Math.round(phase.rate))],
    ]} />`;
  }
  function WeightsDetail({ weights }) {
    return html`<h3>${t("step.weights")}</h3><${Fields} rows=${[
      [field("version"), weights.version === undefined ? null : format(weights.version)], [field("parameters"), format(weights.parameters)], [field("precision"), weights.precision], [field("dtype"), weights.dtype],
      [field("bytes"), bytes(weights.bytes)], [field("hash"), weights.hash && html`<code>${weights.hash}</code>`],
    ]} />`;
  }

  /** The sentence for a box that is no single tensor. */
  function aboutNode(node, { algorithm }) {
    const id = node.about ?? node.sameAs ?? node.id;
    if (id === "policyLoss" && algorithm.policy_loss === "cispo") return t("step.about.policyLoss.cispo");
    return Pellucid.hasText(`step.about.${id}`) ? t(`step.about.${id}`, algorithm.advantage) : null;
  }

  function StepDetail({ node, index, place, onClose }) {
    const names = (node.tensors ?? []).filter((name) => index.tensors[name]);
    const about = aboutNode(node, index);
    // A model whose weights change in this step is recorded as it is afterwards: these are not the weights it ran with.
    const weights = index.weights[node.role];
    const isRunAgainst = weights && (node.showsWeights || !["actor", "critic"].includes(node.role));
    const phases = (node.phases ?? []).map(index.phase).filter(Boolean);
    const figures = (node.metrics ?? []).filter((name) => name in index.metrics);
    return html`<header class="step-detail-head"><h3 class=${node.mono ? "mono" : ""}>${node.title}</h3>
        <button type="button" onClick=${onClose}>${t("step.detail.close")}</button></header>
      ${about && html`<p>${about}</p>`}
      <${Formula} lines=${node.formula} />
      ${phases.map((phase) => html`<${PhaseDetail} key=${phase.phase} phase=${phase} />`)}
      ${isRunAgainst && html`<${WeightsDetail} weights=${weights} />`}
      ${figures.length > 0 && html`<${Fields} rows=${figures.map((name) => [name, format(index.metrics[name])])} />`}
      ${names.map((name, i) => (names.length === 1 && !about ? html`<${TensorDetail} key=${name} name=${name} index=${index} place=${place} />`
        : html`<details key=${name} open=${i === 0}><summary><code>${name}</code></summary><${TensorDetail} name=${name} index=${index} place=${place} /></details>`))}`;
  }

  Pellucid.StepDetail = StepDetail;
})();

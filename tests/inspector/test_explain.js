/* Run by test_explain.py, which computes the cases with pellucid.core and autograd: node --test, with EXPLAIN_CASES=cases.json. */
"use strict";
const assert = require("node:assert/strict");
const fs = require("node:fs");
const path = require("node:path");
const test = require("node:test");

const STATIC = path.join(__dirname, "../../src/pellucid/inspector/static");
const arithmetic = require(path.join(STATIC, "explain.js"));
const { verdict } = require(path.join(STATIC, "pages/token-verdict.js"));
const { figure, written } = require(path.join(STATIC, "pages/token-numbers.js"));

const MASKS = new Set(["response_mask", "action_mask", "ended", "clipped", "value_clipped"]);
const CHANGE = 1e-3; // what must be noticed, relative
const options = { skip: process.env.EXPLAIN_CASES ? false : "EXPLAIN_CASES is not set: run it through test_explain.py" };
const cases = process.env.EXPLAIN_CASES ? JSON.parse(fs.readFileSync(process.env.EXPLAIN_CASES)).map(opened) : [];

function opened(entry) {
  for (const record of entry.records) {
    for (const [name, values] of Object.entries(record.arrays)) {
      record.arrays[name] = (MASKS.has(name) ? Uint8Array : Float32Array).from(values);
    }
  }
  return { ...entry, step: arithmetic.stepOf(entry.manifest, entry.check, entry.samples) };
}
const story = (told, t) => Object.fromEntries(arithmetic.lines(told, t).map((line) => [line.id, line]));
const near = (a, b, around = 0) => Math.abs(a - b) <= 3e-6 * (Math.abs(a) + Math.abs(b) + around) + 1e-9;

function eachToken(visit) {
  for (const entry of cases) {
    entry.records.forEach((record, row) => {
      const told = arithmetic.read(record, entry.step);
      record.arrays.action_mask.forEach((isAction, t) => visit({ entry, record, row, told, t, isAction, where: `${entry.name}, row ${row}, token ${t}` }));
    });
  }
}

test("nothing that the library computed is called a contradiction", options, () => {
  for (const entry of cases) {
    entry.records.forEach((record, row) => {
      assert.deepEqual(arithmetic.contradictions(arithmetic.read(record, entry.step)), [], `${entry.name}, row ${row}`);
    });
  }
});

test("every recorded quantity is compared with one worked out", options, () => {
  eachToken(({ entry, told, t, isAction, where }) => {
    const ids = Object.values(story(told, t)).filter(({ agrees }) => agrees === true).map(({ id }) => id);
    const gae = entry.manifest.algorithm.advantage === "gae";
    const wanted = isAction
      ? ["kl", "reward", "advantage", "log_ratio", "ratio", "clipped", "denominator", "gradient",
        ...(gae ? ["return", "value_clipped", "critic_denominator", "value_gradient"] : []), ...(entry.manifest.whitening ? ["mean", "variance"] : [])]
      : ["reward", "advantage", "gradient", ...(gae ? ["value_gradient"] : [])];
    assert.deepEqual(wanted.filter((id) => !ids.includes(id)), [], where);
  });
});

test("what is not recorded comes to what the library's functions give", options, () => {
  eachToken(({ entry, row, told, t, isAction, where }) => {
    if (!isAction) return;
    const found = story(told, t);
    for (const [id, values] of Object.entries(entry.expected)) {
      if (id === "value_loss" && !found.value_loss) found.value_loss = found.square; // without a clip the square is the loss
      const around = id === "raw_advantage" ? 5 : id === "kl_penalty" ? 1 : 0; // sums and differences of numbers of this size
      assert.ok(near(found[id].result, values[row][t], around), `${where}: ${id} is ${found[id].result}, not ${values[row][t]}`);
    }
  });
});

test("the shares of a minibatch's tokens add up to its loss", options, () => {
  for (const entry of cases) {
    const sums = new Map(), sizes = new Map();
    entry.records.forEach((record) => {
      const told = arithmetic.read(record, entry.step);
      for (const t of told.actions) {
        const { result } = story(told, t).loss_share, key = record.sample.minibatch;
        sums.set(key, (sums.get(key) ?? 0) + result);
        sizes.set(key, (sizes.get(key) ?? 0) + Math.abs(result));
      }
    });
    entry.records.forEach(({ sample }, row) => {
      assert.ok(near(sums.get(sample.minibatch), entry.totals[row], sizes.get(sample.minibatch)), `${entry.name}, row ${row}`);
    });
  }
});

test("the verdict goes against the sign of autograd's gradient", options, () => {
  const pushes = new Set();
  eachToken(({ record, told, t, isAction, where }) => {
    const { push, parts } = verdict(told, t);
    const gradient = record.arrays.logprob_grads[t];
    assert.equal(push, gradient < 0 ? "up" : gradient > 0 ? "down" : "none", where);
    if (!isAction) assert.match(parts[0].key, /\.(prompt|environment)$/, where);
    pushes.add(push);
  });
  assert.deepEqual([...pushes].sort(), ["down", "none", "up"]);
});

// Which line makes the number, and so must contradict when it is changed.
const MAKER = {
  old_logprobs: "kl", ref_logprobs: "kl", kl: "kl", rewards: "reward", old_values: "advantage", returns: "return", advantages: "advantage",
  logprobs: "log_ratio", log_ratio: "log_ratio", ratio: "ratio", clipped: "clipped", logprob_grads: "gradient",
  value_clipped: "value_clipped", value_grads: "value_gradient",
};
const SCALAR_MAKER = { scores: "reward", reward_sum: "reward_sum", actor_denominator: "denominator", critic_denominator: "critic_denominator" };
// Values and returns enter lines that are made before the one that gives them away.
const LATE = new Set(["old_values", "returns"]);

function changed(entry, record, change, undo, check) {
  change();
  check(arithmetic.read(record, entry.step));
  undo();
}

test("one changed number contradicts in the line that makes it", options, () => {
  let count = 0;
  cases.forEach((entry, number) => {
    const record = entry.records[number % entry.records.length];
    const told = arithmetic.read(record, entry.step), t = told.actions[number % told.actions.length];
    for (const [name, line] of Object.entries(MAKER)) {
      const array = record.arrays[name];
      if (!array) continue;
      const before = array[t], where = `${entry.name}: ${name}[${t}] = ${before}`;
      // A value near 0 is one term among others of size 1 in a sum over the sample: there it is these that count.
      const size = name === "old_values" || before === 0 ? 1 : Math.abs(before);
      const wasOnEdge = onEdge(told, t, name);
      const after = MASKS.has(name) ? 1 - before : before + CHANGE * size;
      changed(entry, record, () => { array[t] = after; }, () => { array[t] = before; }, (again) => {
        if (wasOnEdge || onEdge(again, t, name)) return; // float32 may have decided either way, so the flag is believed
        assert.equal(story(again, t)[line].agrees, false, where);
        const found = arithmetic.contradictions(again);
        assert.ok(found.some((entry) => entry.token === t && entry.line === line), where);
        if (!LATE.has(name)) assert.deepEqual(found[0], { token: t, line }, where);
        count += 1;
      });
    }
  });
  assert.ok(count > 10 * cases.length, `${count} changes were tried`);
});

function onEdge(told, t, name) {
  if (name === "clipped") return arithmetic.surrogate(told, t).why === "edge";
  return name === "value_clipped" && story(told, t).value_loss?.note.key.endsWith("edge");
}

test("a changed number of the sample, or of the step, contradicts too", options, () => {
  cases.forEach((entry, number) => {
    const record = entry.records[number % entry.records.length];
    const told = arithmetic.read(record, entry.step);
    for (const [name, line] of Object.entries(SCALAR_MAKER)) {
      const before = record.sample[name], where = `${entry.name}: ${name} = ${before}`;
      if (before === undefined || (name === "reward_sum" && told.chain)) continue;
      changed(entry, record, () => { record.sample[name] = before * (1 + CHANGE) + 1e-4; }, () => { record.sample[name] = before; }, (again) => {
        assert.equal(story(again, told.last)[line].agrees, false, where);
        assert.equal(arithmetic.contradictions(again).filter((found) => found.line === line).length, 1, where);
      });
    }
    for (const name of entry.manifest.whitening ? ["mean", "variance"] : []) {
      const whitening = { ...entry.manifest.whitening };
      whitening[name] = whitening[name] * (1 + CHANGE) + (name === "mean" ? 1e-3 : 0);
      const step = arithmetic.stepOf({ ...entry.manifest, whitening }, entry.check, entry.samples);
      assert.equal(story(arithmetic.read(record, step), told.last)[name].agrees, false, `${entry.name}: ${name}`);
    }
  });
});

test("where only some samples are recorded, what needs the others is left open, not called wrong", options, () => {
  const entry = cases.find(({ manifest }) => manifest.algorithm.advantage === "grpo");
  const told = arithmetic.read(entry.records[0], arithmetic.stepOf({ ...entry.manifest, samples: 99 }, null, entry.samples));
  const found = story(told, told.last);
  assert.deepEqual([found.advantage.agrees, found.denominator.agrees, found.gradient.agrees], [null, null, true]);
  const whole = arithmetic.read(entry.records[0], arithmetic.stepOf({ ...entry.manifest, samples: 99 }, null, entry.samples, 2));
  assert.equal(story(whole, told.last).advantage.agrees, true);
});

test("every note and sentence has its text in both languages", options, () => {
  const texts = {};
  global.Pellucid = { addTexts: (all) => Object.assign(texts, all) };
  require(path.join(STATIC, "texts/token.js"));
  const keys = new Set(), lines = new Set();
  eachToken(({ told, t }) => {
    for (const { id, note } of arithmetic.lines(told, t)) {
      lines.add(`token.line.${id}`);
      if (note) keys.add(note.key);
    }
    for (const { key } of verdict(told, t).parts) keys.add(key);
  });
  assert.ok(keys.size > 40, `${keys.size} keys`);
  for (const language of ["en", "zh"]) {
    assert.deepEqual([...keys, ...lines].filter((key) => !texts[language][key]).sort(), [], language);
  }
  assert.deepEqual(Object.keys(texts.en).sort(), Object.keys(texts.zh).sort());
});

test("formulas are written with the numbers in them", options, () => {
  assert.equal(written`${-1.5} − ${-0.25}`, "−1.5 − (−0.25)");
  assert.equal(written`−${0.1} × ${-2} + max(${-3}, ${-4})`, "−0.1 × (−2) + max(−3, −4)");
  assert.deepEqual([0, 1 - 0.2, 123456.7, -2.5e-7, Infinity, NaN].map(figure), ["0", "0.8", "123460", "−2.500e−7", "∞", "nan"]);
  const { records, step } = cases.find(({ manifest }) => manifest.algorithm.advantage === "gae");
  const told = arithmetic.read(records[2], step), t = told.actions[0], { arrays } = records[2];
  assert.equal(story(told, t).kl.numbers, written`${arrays.old_logprobs[t]} − ${arrays.ref_logprobs[t]}`);
  for (const { numbers } of arithmetic.lines(told, t)) assert.doesNotMatch(numbers, /undefined|NaN|\[object/);
});

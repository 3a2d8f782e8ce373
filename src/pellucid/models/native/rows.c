/* What happens to a row by itself: norms, the gate, rotary positions, and the softmax of the LM head; with their gradients. */

#include "rows.h"

enum { CHUNK = 128 }; /* rows whose share of a norm's gradient is summed first */

/* out = x / sqrt(mean(x^2) + eps) * weight, per row. x, out: (m, width), which may be the same if out is not low. */
void rms_norm(int64_t low, int64_t m, int64_t width, const float *x, const float *weight, float eps, void *out) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < m; i++)
        if (low)
            normalise(1, width, x + i * width, weight, eps, at(out, i * width, 1));
        else
            normalise(0, width, x + i * width, weight, eps, at(out, i * width, 0));
}

int64_t rms_norm_chunks(int64_t m) { return (m + CHUNK - 1) / CHUNK; }

/* The gradient of `rms_norm`: dx = d loss / d x + onto, where onto may be null, or dx itself. dy: (m, width), of the output.
 * dweight: scratch and result, (rms_norm_chunks(m), width), whose first row is the gradient of the weight. */
void rms_norm_backward(int64_t m, int64_t width, const float *dy, const float *x, const float *weight, float eps, const float *onto,
                       float *dx, float *dweight) {
    int64_t chunks = rms_norm_chunks(m);
#pragma omp parallel for schedule(static)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        float *sums = dweight + chunk * width;
        memset(sums, 0, width * sizeof(float));
        for (int64_t i = chunk * CHUNK; i < least((chunk + 1) * CHUNK, m); i++) {
            const float *g = dy + i * width, *xs = x + i * width, *start = onto ? onto + i * width : 0;
            vec squares = {0}, shared = {0};
            int64_t j = 0;
            for (; j + LANES <= width; j += LANES) {
                vec value = *(const vec *)(xs + j);
                squares += value * value;
                shared += *(const vec *)(g + j) * *(const vec *)(weight + j) * value;
            }
            float square = total(squares), along = total(shared);
            for (; j < width; j++) square += xs[j] * xs[j], along += g[j] * weight[j] * xs[j];
            float scale = 1 / sqrtf(square / width + eps), pull = along * scale * scale * scale / width;
            for (j = 0; j + LANES <= width; j += LANES) {
                vec value = *(const vec *)(xs + j), grad = *(const vec *)(g + j);
                *(vec *)(sums + j) += grad * value * scale;
                vec out = grad * *(const vec *)(weight + j) * scale - value * pull;
                *(vec *)(dx + i * width + j) = start ? out + *(const vec *)(start + j) : out;
            }
            for (; j < width; j++) {
                sums[j] += g[j] * xs[j] * scale;
                dx[i * width + j] = g[j] * weight[j] * scale - xs[j] * pull + (start ? start[j] : 0);
            }
        }
    }
    for (int64_t chunk = 1; chunk < chunks; chunk++)
        for (int64_t j = 0; j < width; j++) dweight[j] += dweight[chunk * width + j];
}

/* out (m, width) = silu(gate) * up, where each row of gate_up (m, 2 * width) is gate, then up. */
INLINE void gate_row(int in_low, int low, int64_t width, const void *gate, void *out) {
    int64_t j = 0;
    for (; j + LANES <= width; j += LANES) {
        vec g = get_vec(gate, j, in_low);
        put_vec(out, j, g * sigmoid(g) * get_vec(gate, width + j, in_low), low);
    }
    for (; j < width; j++) {
        float g = get(gate, j, in_low);
        put(out, j, g / (1 + expf(-g)) * get(gate, width + j, in_low), low);
    }
}

/* low: out is bfloat16; in_low: and gate_up too. */
void gated(int64_t low, int64_t in_low, int64_t m, int64_t width, const void *gate_up, void *out) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < m; i++)
        if (low && in_low)
            gate_row(1, 1, width, at(gate_up, i * 2 * width, 1), at(out, i * width, 1));
        else if (low)
            gate_row(0, 1, width, at(gate_up, i * 2 * width, 0), at(out, i * width, 1));
        else
            gate_row(0, 0, width, at(gate_up, i * 2 * width, 0), at(out, i * width, 0));
}

INLINE void gate_row_backward(int low, int64_t width, const float *dout, const void *gate, void *dgate, void *out) {
    int64_t j = 0;
    for (; j + LANES <= width; j += LANES) {
        vec g = get_vec(gate, j, low), up = get_vec(gate, width + j, low), d = *(const vec *)(dout + j), s = sigmoid(g);
        put_vec(out, j, g * s * up, low);
        put_vec(dgate, j, d * up * s * (1.0f + g * (1.0f - s)), low);
        put_vec(dgate, width + j, d * g * s, low);
    }
    for (; j < width; j++) {
        float g = get(gate, j, low), up = get(gate, width + j, low), s = 1 / (1 + expf(-g));
        put(out, j, g * s * up, low);
        put(dgate, j, dout[j] * up * s * (1 + g * (1 - s)), low);
        put(dgate, width + j, dout[j] * g * s, low);
    }
}

/* The gradient of `gated` from dout (m, width), and its output once more. gate_up, dgate_up, out: bfloat16 if low. */
void gated_backward(int64_t low, int64_t m, int64_t width, const float *dout, const void *gate_up, void *dgate_up, void *out) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < m; i++)
        if (low)
            gate_row_backward(1, width, dout + i * width, at(gate_up, i * 2 * width, 1), at(dgate_up, i * 2 * width, 1),
                              at(out, i * width, 1));
        else
            gate_row_backward(0, width, dout + i * width, at(gate_up, i * 2 * width, 0), at(dgate_up, i * 2 * width, 0),
                              at(out, i * width, 0));
}

/* The first `heads` of each row's `all` heads of dim numbers turned by the row's angles, the others as they are: x (m, all, dim)
 * float32 -> out, bfloat16 if low. cosines, sines: (m, dim / 2). */
void rotated(int64_t low, int64_t m, int64_t heads, int64_t all, int64_t dim, float *x, const float *cosines, const float *sines,
             void *out) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < m; i++) {
        float *row = x + i * all * dim;
        for (int64_t head = 0; head < heads; head++) rotate(dim / 2, row + head * dim, cosines + i * (dim / 2), sines + i * (dim / 2));
        int64_t j = 0, width = all * dim;
        for (; j + LANES <= width; j += LANES) put_vec(out, i * width + j, *(const vec *)(row + j), low);
        for (; j < width; j++) put(out, i * width + j, row[j], low);
    }
}

/* out (m) = x, rounded to bfloat16. */
void round_all(int64_t m, const float *x, uint16_t *out) {
#pragma omp parallel for schedule(static)
    for (int64_t start = 0; start < m; start += 4096) {
        int64_t end = least(start + 4096, m), j = start;
        for (; j + LANES <= end; j += LANES) put_vec(out, j, *(const vec *)(x + j), 1);
        for (; j < end; j++) out[j] = rounded(x[j]);
    }
}

/* ---- the LM head ---- */

/* From logits (m, size) of a temperature 1 / scale: log_norm (m) = log sum exp, logprobs (m) of `targets`, and, if asked, the entropy
 * (m), which may be null. */
void head(int64_t m, int64_t size, const float *logits, float scale, const int64_t *targets, float *log_norm, float *logprobs,
          float *entropy) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < m; i++) {
        const float *row = logits + i * size;
        float highest = highest_of(size, row) * scale;
        double sum = 0, weighted = 0;
        for (int64_t start = 0; start < size; start += 1024) { /* float32 within a block, float64 between them */
            vec part = {0}, product = {0};
            int64_t end = least(start + 1024, size), j = start;
            for (; j + LANES <= end; j += LANES) {
                vec x = *(const vec *)(row + j) * scale - highest, e = exponential(x);
                part += e;
                product += e * higher(x, (vec){0} - 1e30f); /* 0 * -inf is no entropy */
            }
            sum += total(part), weighted += total(product);
            for (; j < end; j++) {
                float x = row[j] * scale - highest, e = expf(x);
                sum += e, weighted += e > 0 ? e * x : 0;
            }
        }
        log_norm[i] = highest + (float)log(sum);
        logprobs[i] = row[targets[i]] * scale - log_norm[i];
        if (entropy) entropy[i] = (float)(log(sum) - weighted / sum);
    }
}

INLINE void head_row_backward(int low, int64_t size, const float *row, float scale, int64_t target, float log_norm, float entropy,
                              float dlogprob, float dentropy, void *out) {
    int64_t j = 0;
    for (; j + LANES <= size; j += LANES) {
        vec logp = *(const vec *)(row + j) * scale - log_norm, p = exponential(at_most_0(logp));
        vec centred = dentropy == 0 ? (vec){0} : dentropy * (higher(logp, (vec){0} - 1e30f) + entropy);
        put_vec(out, j, -scale * p * (dlogprob + centred), low);
    }
    for (; j < size; j++) {
        float logp = row[j] * scale - log_norm, p = expf(logp), centred = dentropy == 0 || p == 0 ? 0 : dentropy * (logp + entropy);
        put(out, j, -scale * p * (dlogprob + centred), low);
    }
    float logp = row[target] * scale - log_norm, p = expf(logp), centred = dentropy == 0 ? 0 : dentropy * (logp + entropy);
    put(out, target, scale * (dlogprob - p * (dlogprob + centred)), low);
}

/* The gradient of `head` with respect to the logits, before the temperature: out (m, size), bfloat16 if low. dentropy: (m), or null. */
void head_backward(int64_t low, int64_t m, int64_t size, const float *logits, float scale, const int64_t *targets,
                   const float *log_norm, const float *entropy, const float *dlogprobs, const float *dentropy, void *out) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < m; i++) {
        float ent = dentropy ? entropy[i] : 0, dent = dentropy ? dentropy[i] : 0;
        if (low)
            head_row_backward(1, size, logits + i * size, scale, targets[i], log_norm[i], ent, dlogprobs[i], dent, at(out, i * size, 1));
        else
            head_row_backward(0, size, logits + i * size, scale, targets[i], log_norm[i], ent, dlogprobs[i], dent, at(out, i * size, 0));
    }
}

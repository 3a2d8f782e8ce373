/* A decode step of the embedded engine: attention over the slot cache, and sampling. What PyTorch does with many small operations.
 *
 * A row's result does not depend on its neighbours. */

#include "rows.h"

enum { BLOCK = 64 };

/* ---- attention over the slot cache ---- */

INLINE float dot(int low, int64_t dim, const float *a, const void *b) {
    vec sums = {0};
    int64_t j = 0;
    for (; j + LANES <= dim; j += LANES) sums += *(const vec *)(a + j) * get_vec(b, j, low);
    float sum = total(sums);
    for (; j < dim; j++) sum += a[j] * get(b, j, low);
    return sum;
}

INLINE void fetch(const char *row, int64_t bytes) {
    for (int64_t j = 0; j < bytes; j += 64) __builtin_prefetch(row + j);
    __builtin_prefetch(row + bytes - 1);
}

/* One query head over one slot's keys and values from column `first` to `last`, with a running maximum. sums: scratch, (dim,).
 * It is memory that this waits for, so what is wanted next is fetched ahead: a column's value while its score is computed, and the
 * next head's keys (`next`, at their first column) while the values are summed. */
INLINE void attend_head(int low, int64_t dim, const float *query, const char *keys, const char *values, int64_t first,
                        int64_t last, float scale, const char *next, float *sums, void *out) {
    float highest = -INFINITY, norm = 0;
    int64_t row = dim * (low ? 2 : 4);
    for (int64_t j = 0; j < dim; j++) sums[j] = 0;
    for (int64_t start = first; start <= last; start += BLOCK) {
        int64_t count = last + 1 - start < BLOCK ? last + 1 - start : BLOCK;
        float weights[BLOCK], peak = highest;
        for (int64_t t = 0; t < count; t++) {
            weights[t] = dot(low, dim, query, keys + (start + t) * row) * scale;
            if (!(weights[t] <= peak)) peak = weights[t]; /* NaN too: it must reach the result */
            fetch(values + (start + t) * row, row);
        }
        for (int64_t t = count; t < BLOCK; t++) weights[t] = -INFINITY;
        for (int64_t t = 0; t < BLOCK; t += LANES) *(vec *)(weights + t) = exponential(*(vec *)(weights + t) - peak);
        float shrink = highest == peak ? 1 : expf(highest - peak);
        highest = peak;
        norm *= shrink;
        for (int64_t t = 0; t < count; t++) norm += weights[t];
        int64_t j = 0;
        for (; j + LANES <= dim; j += LANES) {
            vec sum = *(vec *)(sums + j) * shrink;
            const char *value = values + start * row;
            for (int64_t t = 0; t < count; t++) {
                sum += weights[t] * get_vec(value + t * row, j, low);
                if (j == 0) fetch(next + (start - first + t) * row, row);
            }
            *(vec *)(sums + j) = sum;
        }
        for (; j < dim; j++) {
            float sum = sums[j] * shrink;
            for (int64_t t = 0; t < count; t++) sum += weights[t] * get(values + (start + t) * row, j, low);
            sums[j] = sum;
        }
    }
    for (int64_t j = 0; j < dim; j++) put(out, j, sums[j] / norm, low);
}

OWN void attend_head_float32(int64_t dim, const float *query, const char *keys, const char *values, int64_t first, int64_t last,
                             float scale, const char *next, float *sums, void *out) {
    attend_head(0, dim, query, keys, values, first, last, scale, next, sums, out);
}

OWN void attend_head_low(int64_t dim, const float *query, const char *keys, const char *values, int64_t first, int64_t last, float scale,
                         const char *next, float *sums, void *out) {
    attend_head(1, dim, query, keys, values, first, last, scale, next, sums, out);
}

/* Into the cache at `column`: keys and values, (kv_heads, dim) each, of which there is one every `step` elements there. */
INLINE void remember(int low, int64_t kv_heads, int64_t dim, const float *x, int64_t step, void *keys, void *values, int64_t column) {
    for (int64_t head = 0; head < kv_heads; head++)
        for (int64_t j = 0; j < dim; j++) {
            put(keys, column + head * step + j, x[head * dim + j], low);
            put(values, column + head * step + j, x[(kv_heads + head) * dim + j], low);
        }
}

/* What a task, a token and a head of the keys, sees: the row of the cache where its slot begins, and columns. */
typedef struct {
    int64_t row, first, last;
} Seen;

INLINE Seen seen(int64_t task, int64_t kv_heads, int64_t length, const int64_t *slots, const int64_t *positions, int64_t window) {
    int64_t i = task / kv_heads, last = positions[i];
    return (Seen){(slots[i] * kv_heads + task % kv_heads) * length, window && last >= window ? last - window + 1 : 0, last};
}

/* The attention of n tokens, each of some slot at some position: norm (if any) and rotate queries and keys, store keys and values in
 * the cache, then let every query see its slot's columns up to its own.
 *
 * qkv: (n, heads + 2 * kv_heads, dim), overwritten. cosines, sines: (n, dim / 2). keys, values: the cache, (slots, kv_heads, length,
 * dim), in bfloat16 if low. slots, positions: (n,). window: 0 for none. out: (n, heads, dim), as the cache. q_norm, k_norm: (dim,),
 * or null. */
void attend(int64_t low, int64_t n, int64_t heads, int64_t kv_heads, int64_t dim, int64_t length, float *qkv, const float *cosines,
            const float *sines, const float *q_norm, const float *k_norm, float eps, char *keys, char *values, const int64_t *slots,
            const int64_t *positions, int64_t window, float scale, char *out) {
    int64_t group = heads / kv_heads, stride = (heads + 2 * kv_heads) * dim;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; i++) {
            float *token = qkv + i * stride;
            for (int64_t head = 0; head < heads + kv_heads; head++) {
                const float *weight = head < heads ? q_norm : k_norm;
                if (weight) normalise(0, dim, token + head * dim, weight, eps, token + head * dim);
                rotate(dim / 2, token + head * dim, cosines + i * (dim / 2), sines + i * (dim / 2));
            }
            int64_t column = (slots[i] * kv_heads * length + positions[i]) * dim;
            low ? remember(1, kv_heads, dim, token + heads * dim, length * dim, keys, values, column)
                : remember(0, kv_heads, dim, token + heads * dim, length * dim, keys, values, column);
        }
        float sums[dim];
#pragma omp for schedule(dynamic, 8)
        for (int64_t task = 0; task < n * kv_heads; task++) {
            Seen now = seen(task, kv_heads, length, slots, positions, window), later = seen(task + 1 < n * kv_heads ? task + 1 : task,
                                                                                         kv_heads, length, slots, positions, window);
            int64_t i = task / kv_heads, head = task % kv_heads;
            for (int64_t member = head * group; member < (head + 1) * group; member++)
                (low ? attend_head_low : attend_head_float32)(dim, qkv + i * stride + member * dim, at(keys, now.row * dim, low),
                                                              at(values, now.row * dim, low), now.first, now.last, scale,
                                                              at(keys, (later.row + later.first) * dim, low), sums,
                                                              at(out, (i * heads + member) * dim, low));
        }
    }
}

/* ---- sampling ---- */

/* One token per row by inverse CDF, and its log-prob, as sampling.py defines them, without top-k and top-p.
 *
 * logits: (n, size). uniforms: (n,). scale: 1 / temperature. sums: scratch, (n, ceil(size / BLOCK)). */
void sample(int64_t n, int64_t size, const float *logits, float scale, const double *uniforms, double *sums, int64_t *tokens,
            float *logprobs) {
    int64_t blocks = (size + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const float *row = logits + i * size;
        double *ends = sums + i * blocks, sum = 0;
        float highest = highest_of(size, row) * scale, weights[BLOCK];
        int64_t block = 0, wanted = -1;
        for (int pass = 0; pass < 2; pass++) {
            for (; block < blocks; block++) {
                int64_t start = block * BLOCK, count = size - start < BLOCK ? size - start : BLOCK;
                for (int64_t t = 0; t < BLOCK; t++) weights[t] = t < count ? row[start + t] * scale - highest : -INFINITY;
                for (int64_t t = 0; t < BLOCK; t += LANES) *(vec *)(weights + t) = exponential(*(vec *)(weights + t));
                if (pass) break;
                vec part = {0};
                for (int64_t t = 0; t < BLOCK; t += LANES) part += *(vec *)(weights + t);
                ends[block] = sum += total(part);
            }
            if (!pass) {
                double target = uniforms[i] * sum;
                for (block = 0; block < blocks - 1 && ends[block] <= target;) block++;
            }
        }
        double before = block ? ends[block - 1] : 0, share = (uniforms[i] * sum - before) / (ends[block] - before), inside = 0, run = 0;
        for (int t = 0; t < BLOCK; t++) inside += weights[t];
        for (int t = 0; t < BLOCK; t++) {
            if (weights[t] > 0) wanted = t; /* the last possible one, if rounding leaves none */
            run += weights[t];
            if (run > share * inside && weights[t] > 0) break;
        }
        if (wanted < 0) wanted = 0;
        tokens[i] = block * BLOCK + wanted < size ? block * BLOCK + wanted : size - 1;
        logprobs[i] = row[tokens[i]] * scale - highest - (float)log(sum);
    }
}

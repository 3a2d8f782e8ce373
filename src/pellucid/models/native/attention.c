/* Causal attention of sequences that lie end to end, and its gradient, for training. Every product is a `tile`.
 *
 * A task is a sequence and a head of its keys: their panels are laid out once, then ROWS queries at a time see the keys before them.
 * Whole rows of scores exist for a moment, which at the lengths that are trained on here fit into a cache. */

#include <stdlib.h>

#include "product.h"
#include "rows.h"

enum { QUERIES = 8 * ROWS }; /* at once in the backward pass, which sums over them; even, since low sums pairs */

/* One task. q, k, v: at the first token, the group's first head; `row` elements to the next token. */
typedef struct {
    const void *q, *k, *v;
    int64_t row, members, dim, length, window;
    int64_t columns, wide, span;        /* length, dim, and the greater of the two, rounded up to panels */
    int64_t dim_steps, column_steps;    /* units of depth that dim and `columns` make */
    float scale;
} Task;

INLINE int64_t up(int64_t n) { return (n + COLUMNS - 1) / COLUMNS * COLUMNS; }

INLINE Task task_of(int low, int64_t heads, int64_t kv_heads, int64_t dim, int64_t begin, int64_t end, int64_t head, int64_t window,
                    float scale, const void *qkv) {
    int64_t row = (heads + 2 * kv_heads) * dim, members = heads / kv_heads, columns = up(end - begin), wide = up(dim);
    const void *tokens = at(qkv, begin * row, low);
    return (Task){
        at(tokens, head * members * dim, low),
        at(tokens, (heads + head) * dim, low),
        at(tokens, (heads + kv_heads + head) * dim, low),
        row, members, dim, end - begin, window,
        columns, wide, columns > wide ? columns : wide,
        low ? dim / 2 : dim, low ? columns / 2 : columns,
        scale,
    };
}

/* Panels with a column for each token and depth dim, for products with one token at a time. */
INLINE void pack_by_token(int low, const Task *t, const void *x, float *panels) {
    for (int64_t first = 0; first < t->length; first += COLUMNS)
        pack_rows(least(t->length - first, COLUMNS), t->dim_steps, (const float *)at(x, first * t->row, low), low ? t->row / 2 : t->row,
                  panels + first * t->dim_steps);
}

/* Panels with a column for each of dim and `tokens` deep, for sums over tokens; `steps` units each, zeros beyond the tokens. */
INLINE void pack_by_dim(int low, int64_t dim, int64_t tokens, int64_t steps, const void *x, int64_t row, float *panels) {
    int64_t used = low ? (tokens + 1) / 2 : tokens;
    for (int64_t first = 0; first < dim; first += COLUMNS) {
        float *panel = panels + first * steps;
        pack_depth(low, COLUMNS, least(dim - first, COLUMNS), tokens, at(x, first, low), row, panel);
        memset(panel + used * COLUMNS, 0, (steps - used) * COLUMNS * sizeof(float));
    }
}

/* A tile whose columns are of dim: the last may be half empty. */
INLINE void dim_tile(int rows, int low, int64_t columns, int64_t steps, const void *a, int64_t a_row, int64_t a_step, const float *panel,
                     vec sums[][2]) {
    if (columns > LANES)
        tile(rows, 2, low, steps, a, a_row, a_step, panel, sums);
    else
        tile(rows, 1, low, steps, a, a_row, a_step, panel, sums);
}

/* ROWS rows of x, one below the other; zeros where there are fewer. */
INLINE void gather(int low, int64_t count, int64_t dim, const void *x, int64_t row, void *out) {
    memset(out, 0, ROWS * dim * (low ? 2 : 4));
    for (int64_t r = 0; r < count; r++) memcpy(at(out, r * dim, low), at(x, r * row, low), dim * (low ? 2 : 4));
}

/* out (ROWS, span) = rows (ROWS, dim) . tokens^T * scale, for the first `columns` tokens. */
INLINE void against_tokens(int low, const Task *t, const void *rows, const float *tokens, int64_t columns, float scale, float *out) {
    for (int64_t first = 0; first < columns; first += COLUMNS) {
        vec sums[ROWS][2];
        tile(ROWS, 2, low, t->dim_steps, rows, t->dim_steps, 1, tokens + first * t->dim_steps, sums);
        for (int r = 0; r < ROWS; r++)
            for (int half = 0; half < 2; half++) *(vec *)(out + r * t->span + first + half * LANES) = sums[r][half] * scale;
    }
}

/* -infinity where `query` does not see. */
INLINE void hide(const Task *t, int64_t query, int64_t columns, float *row) {
    int64_t first = t->window && query >= t->window ? query - t->window + 1 : 0;
    for (int64_t i = 0; i < first; i++) row[i] = -INFINITY;
    for (int64_t i = query + 1; i < columns; i++) row[i] = -INFINITY;
}

/* weights = exp(row - its maximum), bfloat16 if low. Returns their sum; *highest is the maximum. */
INLINE float softmax_row(int low, int64_t columns, const float *row, void *weights, float *highest) {
    vec sum = {0};
    *highest = highest_of(columns, row);
    for (int64_t i = 0; i < columns; i += LANES) {
        vec e = exponential(*(const vec *)(row + i) - *highest);
        sum += e;
        put_vec(weights, i, e, low);
    }
    return total(sum);
}

/* out, log_norms: at the first token and the group's first head; out_row and norm_row to the next token. */
INLINE void forward(int low, const Task *t, float *scratch, void *out, int64_t out_row, float *log_norms, int64_t norm_row) {
    float *keys = scratch, *values = keys + t->columns * t->dim_steps, *rows = values + t->wide * t->column_steps;
    float *weights = rows + ROWS * t->span, *queries = weights + ROWS * t->columns;
    pack_by_token(low, t, t->k, keys);
    pack_by_dim(low, t->dim, t->length, t->column_steps, t->v, t->row, values);
    for (int64_t member = 0; member < t->members; member++)
        for (int64_t start = 0; start < t->length; start += ROWS) {
            int64_t count = least(t->length - start, ROWS), columns = up(start + count), steps = low ? columns / 2 : columns;
            float norms[ROWS], highest;
            gather(low, count, t->dim, at(t->q, start * t->row + member * t->dim, low), t->row, queries);
            against_tokens(low, t, queries, keys, columns, t->scale, rows);
            for (int64_t r = 0; r < ROWS; r++) {
                hide(t, least(start + r, t->length - 1), columns, rows + r * t->span);
                norms[r] = softmax_row(low, columns, rows + r * t->span, at(weights, r * columns, low), &highest);
                if (r < count) log_norms[(start + r) * norm_row + member] = highest + logf(norms[r]);
            }
            for (int64_t first = 0; first < t->dim; first += COLUMNS) {
                vec sums[ROWS][2];
                dim_tile(ROWS, low, t->dim - first, steps, weights, steps, 1, values + first * t->column_steps, sums);
                for (int64_t r = 0; r < count; r++) {
                    vec shares[1][2] = {{sums[r][0] / norms[r], sums[r][1] / norms[r]}};
                    void *there = at(out, (start + r) * out_row + member * t->dim + first, low);
                    store(1, shares, 0, there, 0, least(t->dim - first, COLUMNS), 0, low);
                }
            }
        }
}

INLINE float dot(int low, int64_t dim, const void *a, const void *b) {
    vec sums = {0};
    int64_t j = 0;
    for (; j + LANES <= dim; j += LANES) sums += get_vec(a, j, low) * get_vec(b, j, low);
    float sum = total(sums);
    for (; j < dim; j++) sum += get(a, j, low) * get(b, j, low);
    return sum;
}

/* P from a row of scores, and dS = P * (dP - along) * scale, where along = sum(dout * out). */
INLINE void softmax_row_backward(int low, int64_t columns, const float *scores, const float *dp, float log_norm, float along,
                                 float scale, void *p, void *ds) {
    for (int64_t i = 0; i < columns; i += LANES) {
        vec weight = exponential(at_most_0(*(const vec *)(scores + i) - log_norm));
        put_vec(p, i, weight, low);
        put_vec(ds, i, weight * (*(const vec *)(dp + i) - along) * scale, low);
    }
}

/* sums (columns, wide) += a (rows, columns)^T . panels, over the rows. packed: scratch for COLUMNS columns of a. */
INLINE void sum_over_rows(int low, int64_t rows, int64_t columns, int64_t dim, int64_t wide, const float *a, const float *panels, int64_t panel_steps,
                          float *packed, float *result) {
    enum { REST = COLUMNS % ROWS };
    int64_t steps = low ? (rows + 1) / 2 : rows;
    for (int64_t first = 0; first < columns; first += COLUMNS) {
        pack_depth(low, COLUMNS, COLUMNS, rows, at(a, first, low), columns, packed);
        for (int64_t j = 0; j < wide; j += COLUMNS) {
            vec sums[ROWS][2];
            const float *panel = panels + j * panel_steps;
            float *out = result + first * wide + j;
            int64_t r = 0;
            for (; r + ROWS <= COLUMNS; r += ROWS) {
                dim_tile(ROWS, low, dim - j, steps, packed + r, 1, COLUMNS, panel, sums);
                store(ROWS, sums, 0, out + r * wide, wide, COLUMNS, 1, 0);
            }
            dim_tile(REST, low, dim - j, steps, packed + r, 1, COLUMNS, panel, sums);
            store(REST, sums, 0, out + r * wide, wide, COLUMNS, 1, 0);
        }
    }
}

/* out = x, turned back by the angles if there are any. x: (dim,), overwritten. */
INLINE void put_gradient(int low, int64_t dim, float *x, const float *cosines, const float *sines, void *out) {
    for (int64_t j = 0; cosines && j < dim / 2; j++) {
        float first = x[j], second = x[dim / 2 + j];
        x[j] = first * cosines[j] + second * sines[j];
        x[dim / 2 + j] = second * cosines[j] - first * sines[j];
    }
    int64_t j = 0;
    for (; j + LANES <= dim; j += LANES) put_vec(out, j, *(const vec *)(x + j), low);
    for (; j < dim; j++) put(out, j, x[j], low);
}

/* out, dout, log_norms: as in `forward`. cosines, sines: (length, dim / 2). dq, dk, dv: as q, k and v. */
INLINE void backward(int low, const Task *t, float *scratch, const void *out, const void *dout, int64_t out_row, const float *log_norms,
                     int64_t norm_row, const float *cosines, const float *sines, void *dq, void *dk, void *dv) {
    int64_t half = t->dim / 2, block_steps = low ? QUERIES / 2 : QUERIES;
    float *keys = scratch, *values = keys + t->columns * t->dim_steps, *keys_by_dim = values + t->columns * t->dim_steps;
    float *key_sums = keys_by_dim + t->wide * t->column_steps, *value_sums = key_sums + t->columns * t->wide;
    float *rows = value_sums + t->columns * t->wide, *dp = rows + ROWS * t->span, *by_query = dp + ROWS * t->span;
    float *packed = by_query + block_steps * t->wide, *queries = packed + block_steps * COLUMNS;
    float *p = queries + ROWS * t->dim, *ds = p + QUERIES * t->columns;
    pack_by_token(low, t, t->k, keys);
    pack_by_token(low, t, t->v, values);
    pack_by_dim(low, t->dim, t->length, t->column_steps, t->k, t->row, keys_by_dim);
    memset(key_sums, 0, 2 * t->columns * t->wide * sizeof(float));
    for (int64_t member = 0; member < t->members; member++)
        for (int64_t block = 0; block < t->length; block += QUERIES) {
            int64_t n = least(t->length - block, QUERIES), columns = up(block + n), steps = low ? columns / 2 : columns;
            const void *q = at(t->q, block * t->row + member * t->dim, low), *d = at(dout, block * out_row + member * t->dim, low);
            for (int64_t start = 0; start < n; start += ROWS) {
                int64_t count = least(n - start, ROWS), token = block + start;
                gather(low, count, t->dim, at(q, start * t->row, low), t->row, queries);
                against_tokens(low, t, queries, keys, columns, t->scale, rows);
                gather(low, count, t->dim, at(d, start * out_row, low), out_row, queries);
                against_tokens(low, t, queries, values, columns, 1, dp);
                for (int64_t r = 0; r < count; r++) {
                    const void *o = at(out, (token + r) * out_row + member * t->dim, low);
                    float along = dot(low, t->dim, o, at(queries, r * t->dim, low));
                    hide(t, token + r, columns, rows + r * t->span);
                    softmax_row_backward(low, columns, rows + r * t->span, dp + r * t->span, log_norms[(token + r) * norm_row + member],
                                         along, t->scale, at(p, (start + r) * columns, low), at(ds, (start + r) * columns, low));
                }
                for (int64_t first = 0; first < t->dim; first += COLUMNS) { /* dQ = dS . K, over the scores, which are done with */
                    vec sums[ROWS][2];
                    dim_tile(ROWS, low, t->dim - first, steps, at(ds, start * columns, low), steps, 1,
                             keys_by_dim + first * t->column_steps, sums);
                    store(ROWS, sums, 0, rows + first, t->span, COLUMNS, 0, 0);
                }
                for (int64_t r = 0; r < count; r++)
                    put_gradient(low, t->dim, rows + r * t->span, cosines + (token + r) * half, sines + (token + r) * half,
                                 at(dq, (token + r) * t->row + member * t->dim, low));
            }
            pack_by_dim(low, t->dim, n, block_steps, d, out_row, by_query);
            sum_over_rows(low, n, columns, t->dim, t->wide, p, by_query, block_steps, packed, value_sums);
            pack_by_dim(low, t->dim, n, block_steps, q, t->row, by_query);
            sum_over_rows(low, n, columns, t->dim, t->wide, ds, by_query, block_steps, packed, key_sums);
        }
    for (int64_t i = 0; i < t->length; i++) {
        put_gradient(low, t->dim, key_sums + i * t->wide, cosines + i * half, sines + i * half, at(dk, i * t->row, low));
        put_gradient(low, t->dim, value_sums + i * t->wide, 0, 0, at(dv, i * t->row, low));
    }
}

OWN void forward_float32(const Task *t, float *scratch, void *out, int64_t out_row, float *log_norms, int64_t norm_row) {
    forward(0, t, scratch, out, out_row, log_norms, norm_row);
}

OWN void forward_low(const Task *t, float *scratch, void *out, int64_t out_row, float *log_norms, int64_t norm_row) {
    forward(1, t, scratch, out, out_row, log_norms, norm_row);
}

OWN void backward_float32(const Task *t, float *scratch, const void *out, const void *dout, int64_t out_row, const float *log_norms,
                          int64_t norm_row, const float *cosines, const float *sines, const Task *d) {
    backward(0, t, scratch, out, dout, out_row, log_norms, norm_row, cosines, sines, (void *)d->q, (void *)d->k, (void *)d->v);
}

OWN void backward_low(const Task *t, float *scratch, const void *out, const void *dout, int64_t out_row, const float *log_norms,
                      int64_t norm_row, const float *cosines, const float *sines, const Task *d) {
    backward(1, t, scratch, out, dout, out_row, log_norms, norm_row, cosines, sines, (void *)d->q, (void *)d->k, (void *)d->v);
}

/* Floats that a task may need, in either direction and precision. */
static int64_t scratch_of(int64_t sequences, const int64_t *ends, int64_t dim) {
    int64_t length = 0;
    for (int64_t i = 0; i < sequences; i++) {
        int64_t own = ends[i] - (i ? ends[i - 1] : 0);
        length = own > length ? own : length;
    }
    int64_t columns = up(length), wide = up(dim), span = columns > wide ? columns : wide;
    return 2 * columns * dim + 3 * columns * wide + ROWS * (2 * span + dim) + QUERIES * (wide + COLUMNS + 2 * columns);
}

/* qkv: (n, heads + 2 * kv_heads, dim), queries and keys turned; bfloat16 if low, and then dim is even. ends: (sequences,), where each
 * sequence ends. window: 0 for none. out: (n, heads, dim), as qkv. log_norms: (n, heads) float32, for the backward pass. */
void packed_attention(int64_t low, int64_t sequences, int64_t heads, int64_t kv_heads, int64_t dim, const int64_t *ends, int64_t window,
                      float scale, const void *qkv, void *out, float *log_norms) {
    int64_t members = heads / kv_heads, out_row = heads * dim, size = scratch_of(sequences, ends, dim);
#pragma omp parallel
    {
        float *scratch = malloc(size * sizeof(float));
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < sequences * kv_heads; task++) {
            int64_t i = task / kv_heads, head = task % kv_heads, begin = i ? ends[i - 1] : 0;
            Task t = task_of(low, heads, kv_heads, dim, begin, ends[i], head, window, scale, qkv);
            void *o = at(out, begin * out_row + head * members * dim, low);
            float *norms = log_norms + begin * heads + head * members;
            (low ? forward_low : forward_float32)(&t, scratch, o, out_row, norms, heads);
        }
        free(scratch);
    }
}

/* dqkv, as qkv: the gradient with respect to the queries and keys before they were turned by the angles (n, dim / 2), and the values.
 * out, log_norms: what `packed_attention` gave. dout: as out. */
void packed_attention_backward(int64_t low, int64_t sequences, int64_t heads, int64_t kv_heads, int64_t dim, const int64_t *ends,
                               int64_t window, float scale, const void *qkv, const void *out, const float *log_norms, const void *dout,
                               const float *cosines, const float *sines, void *dqkv) {
    int64_t members = heads / kv_heads, out_row = heads * dim, size = scratch_of(sequences, ends, dim);
#pragma omp parallel
    {
        float *scratch = malloc(size * sizeof(float));
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < sequences * kv_heads; task++) {
            int64_t i = task / kv_heads, head = task % kv_heads, begin = i ? ends[i - 1] : 0;
            Task t = task_of(low, heads, kv_heads, dim, begin, ends[i], head, window, scale, qkv);
            Task g = task_of(low, heads, kv_heads, dim, begin, ends[i], head, window, scale, dqkv);
            const void *o = at(out, begin * out_row + head * members * dim, low);
            const float *norms = log_norms + begin * heads + head * members;
            const float *cos = cosines + begin * (dim / 2), *sin = sines + begin * (dim / 2);
            const void *d = at(dout, begin * out_row + head * members * dim, low);
            (low ? backward_low : backward_float32)(&t, scratch, o, d, out_row, norms, heads, cos, sin, &g);
        }
        free(scratch);
    }
}

/* Operations on one row that several kernels need. */

#pragma once

#include "common.h"

/* out = x / sqrt(mean(x^2) + eps) * weight [Zhang & Sennrich 2019]. */
INLINE void normalise(int low, int64_t width, const float *x, const float *weight, float eps, void *out) {
    vec squares = {0};
    int64_t j = 0;
    for (; j + LANES <= width; j += LANES) squares += *(const vec *)(x + j) * *(const vec *)(x + j);
    float sum = total(squares);
    for (; j < width; j++) sum += x[j] * x[j];
    float scale = 1 / sqrtf(sum / width + eps);
    for (j = 0; j + LANES <= width; j += LANES) put_vec(out, j, *(const vec *)(x + j) * scale * *(const vec *)(weight + j), low);
    for (; j < width; j++) put(out, j, x[j] * scale * weight[j], low);
}

/* Rotary positions [Su et al. 2021], halves form, in place. x: (2 * half,). */
INLINE void rotate(int64_t half, float *x, const float *cosines, const float *sines) {
    for (int64_t j = 0; j < half; j++) {
        float first = x[j], second = x[half + j];
        x[j] = first * cosines[j] - second * sines[j];
        x[half + j] = second * cosines[j] + first * sines[j];
    }
}

INLINE float highest_of(int64_t size, const float *x) {
    vec peaks = (vec){0} - INFINITY;
    int64_t j = 0;
    for (; j + LANES <= size; j += LANES) peaks = higher(*(const vec *)(x + j), peaks);
    float highest = greatest(peaks);
    for (; j < size; j++) highest = x[j] > highest ? x[j] : highest;
    return highest;
}

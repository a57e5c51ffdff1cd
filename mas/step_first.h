/* The first lanes of a vector, where the instructions have no masks: by way of a whole one. */

FAST INLINE Floats f_get_first(const float *x, int64_t n) {
    if (n >= LANES)
        return f_get(x);
    float lanes[LANES] = {0};
    memcpy(lanes, x, (size_t)n * sizeof *x);
    return f_get(lanes);
}
FAST INLINE void f_put_first(float *x, int64_t n, Floats a) {
    if (n >= LANES) {
        f_put(x, a);
        return;
    }
    float lanes[LANES];
    f_put(lanes, a);
    memcpy(x, lanes, (size_t)n * sizeof *x);
}

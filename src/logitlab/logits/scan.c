/*
 * One pass over the vocabulary, statistics taken while logits are in the nearest cache.
 *
 * Compiled on the user's own machine by logitlab/logits/compiled.py, which also declares what goes in and out; plain
 * C11 with the vector types of GCC and Clang. Definitions are those of logitlab/logits/statistics.py.
 *
 * How it goes
 *   - A lane of a vector is a row to decode, so running maxima, sums and counts of many rows are single
 *     instructions and nothing is ever reduced across a vector. PANEL rows are handled together.
 *   - Columns (head rows) go in tiles that stay in the second-level cache while all panels of a block use them.
 *   - logits of [tile x PANEL] live in the first-level cache: written by `product`, read by `accumulate`.
 *   - Work is cut into (block of rows) x (slice of columns); threads take the next piece until none is left.
 *     What two slices found is merged at the end. Each piece is summed by one thread in one order, so for a given cut
 *     the numbers do not depend on who does it; by default native.py cuts by the number of threads, though.
 *
 * Numbers that are none
 *   A row with a NaN or an infinite positive logit has no distribution. `moment` of such a row is NaN, and that is how
 *   Python knows it; its candidates and counts are in range but mean nothing.
 *
 * Three modes
 *   EXACT      float32 products.
 *   BFLOAT16   rows and head are bfloat16 already: their products are exact in float32, only sums round.
 *   SCREENED   rows and head are rounded to bfloat16 for a first look. A logit is off by at most
 *              |x - x'| |w| + |x'| |w - w'| (Cauchy-Schwarz). Whatever can still matter within that is computed
 *              again from the float32 numbers, in place; of the rest it is summed how much it can be off.
 */

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define ABI 3 /* changes with `struct job`; checked by compiled.py */

/* Registers: MV x NV accumulators, NV vectors of rows and one broadcast column. */
#if defined(LOGITLAB_LANES) /* for tests of the plain path */
#define LANES LOGITLAB_LANES
#define NV 2
#define MV 4
#elif defined(__AVX512F__) && defined(__AVX512DQ__)
#define LANES 16
#define NV 2
#define MV 14
#elif defined(__AVX__)
#define LANES 8
#define NV 2
#define MV 6
#elif defined(__aarch64__)
#define LANES 4
#define NV 4
#define MV 6
#else
#define LANES 4
#define NV 2
#define MV 4
#endif
#define PANEL (LANES * NV)

#if LANES == 16 && defined(__AVX512BF16__)
#define HAS_BFLOAT16 1
#else
#define HAS_BFLOAT16 0
#endif

/* Half precision by instruction; builds with the shortest vectors have the plain way, which is tested that way. */
#if LANES >= 8 && defined(__F16C__)
#define HAS_FLOAT16 1
#else
#define HAS_FLOAT16 0
#endif

#define UNROLL _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(4 * LANES), may_alias));
typedef float vfu __attribute__((vector_size(4 * LANES), may_alias, aligned(4)));
typedef int32_t vi __attribute__((vector_size(4 * LANES), may_alias));
typedef double vd __attribute__((vector_size(8 * LANES), may_alias));

enum { EXACT = 0, BFLOAT16 = 1, SCREENED = 2 };
enum { W_FLOAT32 = 0, W_BFLOAT16 = 1, W_FLOAT16 = 2 };

/* What Python fills in. Sizes in elements; pointers may be NULL where it says so. */
struct job {
  int64_t n, d, columns;      /* rows, width, columns */
  int64_t first;              /* id of the first column */
  const float *x;             /* [n, d] */
  const void *w;              /* [columns, ldw] */
  int64_t ldw;
  const float *bias, *offset; /* [columns] or NULL */
  const uint8_t *allowed;     /* [columns] or NULL: which columns are ranked */
  const float *w_size, *w_lost; /* SCREENED: [columns] |w| and |w - w'|, see logitlab_sizes */
  const double *bound;        /* [n] bound on the rounding error of a float32 logit */
  const int32_t *order;       /* [n] rows in the order of work */
  const int64_t *blocks;      /* [n_blocks + 1] where blocks begin in `order` */
  const int32_t *place;       /* [n] the reference row of each row, by row; NULL without a reference */
  const int32_t *ref_first, *ref_count; /* [n_blocks] which reference rows a block needs */
  const uint8_t *ref_counts;  /* [n_blocks] whether the block adds to `mass` */
  const float *ref;           /* [n_ref, d] */
  const double *ref_lse;      /* [n_ref] */
  const int32_t *ref_ids;     /* [n_ref, ref_keep] columns to leave out of the sums */
  const int64_t *target_ids;  /* [n, targets] or NULL */
  const double *target_z;     /* [n, targets] their logits */
  int64_t n_blocks, n_ref, ref_keep, targets;
  int64_t keep, keep_ranked;  /* candidates; keep_ranked is 0 without `allowed` */
  int64_t slices, tile, threads;
  double scale, softcap;      /* softcap 0: none */
  float theta;                /* SCREENED: columns less likely than exp(-theta) may stay rough */
  float theta_ref;            /* the same of the reference's probabilities */
  float patience;             /* SCREENED: a row of which more columns had to be computed again is given up */
  int32_t w_type, mode;
  /* Results: [slices, n, ...]; what is merged is in slice 0. */
  float *max;
  double *sum, *moment, *cross; /* of exp(z - max), exp(z - max) (z - max), weight (reference z - z) */
  double *tail, *tail_moment, *tail_cross; /* SCREENED: the same, of rough columns, times how far each can be off */
  double *mass;                 /* [slices, n_ref] sum of the reference's weights */
  float *best_z, *ranked_z;     /* [slices, n, keep], [slices, n, keep_ranked] */
  int32_t *best_id, *ranked_id;
  int64_t *before;              /* [slices, n, targets] */
  double *most;                 /* [slices, n] the most that any rough logit can be off; infinite for rows given up */
  int64_t *again;               /* [slices, n] columns computed again */
};

/* -- small vectors ----------------------------------------------------------------------------------------------- */

INLINE vf splat(float a) { return a - (vf){0}; }
INLINE vf load(const float *p) { return *(const vf *)p; }
INLINE vf loadu(const float *p) { return *(const vfu *)p; }
INLINE void store(float *p, vf a) { *(vf *)p = a; }
INLINE vf choose(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }

/* The larger; the second where one of them is NaN (on ARM NaN then, which does for all uses here too). */
INLINE vf vmax(vf a, vf b) {
#if LANES == 16
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif LANES == 8 && defined(__AVX__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif LANES == 4 && defined(__aarch64__)
  return (vf)vmaxq_f32((float32x4_t)a, (float32x4_t)b);
#else
  return choose(a > b, a, b);
#endif
}

/* Lanes where a > b, as bits. */
INLINE uint32_t above(vf a, vf b) {
#if LANES == 16
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
#elif LANES == 8 && defined(__AVX__)
  return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ));
#else
  vi mask = a > b;
  uint32_t bits = 0;
  for (int i = 0; i < LANES; i++) bits |= (uint32_t)(mask[i] != 0) << i;
  return bits;
#endif
}

INLINE vf vabs(vf a) { return (vf)((vi)a & 0x7fffffff); }

/* exp(x) for x <= 0, relative error below 2e-7; 0 below -87. */
INLINE vf vexp(vf x) {
  vf t = x * 1.44269504f + 12582912.0f; /* rounds x / ln 2 to a whole number */
  vf n = t - 12582912.0f;
  vf r = x - n * 0.693145752f;
  r = r - n * 1.42860677e-6f;
  vf p = r * 1.98756915e-4f + 1.39819995e-3f;
  p = p * r + 8.33345205e-3f;
  p = p * r + 4.16657962e-2f;
  p = p * r + 1.66666657e-1f;
  p = p * r + 5.0e-1f;
  p = p * r * r + r + 1.0f;
  vi power = ((vi)t - 0x4b400000) << 23;
  vf e = (vf)((vi)p + power);
  return (vf)((vi)e & (vi)(x > -87.0f));
}

/* tanh(x), absolute error below 2e-7; NaN of NaN. */
INLINE vf vtanh(vf x) {
  vf a = vabs(x);
  a = choose(a > 20.0f, splat(20.0f), a);
  vf e = vexp(a * -2.0f);
  vf y = (1.0f - e) / (1.0f + e);
  return choose(x == x, (vf)((vi)y | ((vi)x & (int32_t)0x80000000)), x);
}

/* -- numbers of 16 bits ------------------------------------------------------------------------------------------ */

INLINE float bits_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}

INLINE uint32_t float_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

INLINE float from_bfloat16(uint16_t h) { return bits_float((uint32_t)h << 16); }

INLINE uint16_t to_bfloat16(float f) { /* to nearest, ties to even */
  uint32_t u = float_bits(f);
  if ((u & 0x7fffffff) > 0x7f800000) return (uint16_t)(u >> 16 | 0x40); /* NaN: rounding could carry it into a number */
  return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

/* No step is a subnormal float32, which processors may be told to take for zero. */
INLINE float from_float16(uint16_t h) {
  uint32_t exponent = h & 0x7c00, usual = ((uint32_t)(h & 0x7fff) << 13) + 0x38000000; /* 127 - 15 = 112 more */
  uint32_t u = exponent == 0        ? float_bits((float)(h & 0x3ff) * 0x1p-24f)
               : exponent == 0x7c00 ? usual + 0x38000000 /* infinite or NaN: all ones */
                                    : usual;
  return bits_float(u | (uint32_t)(h & 0x8000) << 16);
}

/* LANES numbers in half precision. */
INLINE vf load_float16(const uint16_t *p) {
#if HAS_FLOAT16 && LANES == 16
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif HAS_FLOAT16
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
  vf out;
  for (int i = 0; i < LANES; i++) out[i] = from_float16(p[i]);
  return out;
#endif
}

static void narrow(const float *restrict from, int64_t d, uint16_t *restrict out) {
  int64_t k = 0;
#if HAS_BFLOAT16
  for (; k + LANES <= d; k += LANES)
    _mm256_storeu_si256((__m256i *)(out + k), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + k)));
#endif
  for (; k < d; k++) out[k] = to_bfloat16(from[k]);
}

static const void *head_row(const struct job *j, int64_t v) {
  int64_t size = j->w_type == W_FLOAT32 ? 4 : 2;
  return (const char *)j->w + v * j->ldw * size;
}

static void widen(const struct job *j, int64_t v, float *restrict out) {
  const void *w = head_row(j, v);
  if (j->w_type == W_FLOAT32)
    memcpy(out, w, (size_t)j->d * 4);
  else if (j->w_type == W_BFLOAT16)
    for (int64_t k = 0; k < j->d; k++) out[k] = from_bfloat16(((const uint16_t *)w)[k]);
  else {
    const uint16_t *h = w;
    int64_t k = 0;
    for (; k + LANES <= j->d; k += LANES) *(vfu *)(out + k) = load_float16(h + k);
    for (; k < j->d; k++) out[k] = from_float16(h[k]);
  }
}

/* -- single products --------------------------------------------------------------------------------------------- */

/* Sum of products in float64, always in the same order, so that equal head rows give equal logits. */
static double dot64(const struct job *j, const float *restrict x, const void *restrict w) {
  enum { CHAINS = 2 };
  vd acc[CHAINS] = {{0}};
  int64_t k = 0, d = j->d;
  for (; k + CHAINS * LANES <= d; k += CHAINS * LANES)
    for (int c = 0; c < CHAINS; c++) {
      vf a = loadu(x + k + c * LANES), b;
      if (j->w_type == W_FLOAT32)
        b = loadu((const float *)w + k + c * LANES);
      else if (j->w_type == W_BFLOAT16)
        for (int i = 0; i < LANES; i++) b[i] = from_bfloat16(((const uint16_t *)w)[k + c * LANES + i]);
      else
        b = load_float16((const uint16_t *)w + k + c * LANES);
      acc[c] += __builtin_convertvector(a, vd) * __builtin_convertvector(b, vd);
    }
  double sum = 0;
  for (int i = 0; i < LANES; i++) sum += acc[0][i] + acc[1][i];
  for (; k < d; k++) {
    float b = j->w_type == W_FLOAT32 ? ((const float *)w)[k]
              : j->w_type == W_BFLOAT16 ? from_bfloat16(((const uint16_t *)w)[k])
                                        : from_float16(((const uint16_t *)w)[k]);
    sum += (double)x[k] * b;
  }
  return sum;
}

static double postmap64(const struct job *j, double z, int64_t v) {
  if (j->bias) z += j->bias[v];
  if (j->softcap != 0)
    z = tanh(z * (j->scale / j->softcap)) * j->softcap;
  else
    z *= j->scale;
  return j->offset ? z + j->offset[v] : z;
}

static double logit64(const struct job *j, const float *x, int64_t v) {
  return postmap64(j, dot64(j, x, head_row(j, v)), v);
}

/* The same product in float32, for screening. `w` is the widened head row. */
INLINE float dot32(const float *restrict x, const float *restrict w, int64_t d) {
  vf a0 = {0}, a1 = {0}, a2 = {0}, a3 = {0};
  int64_t k = 0;
  for (; k + 4 * LANES <= d; k += 4 * LANES) {
    a0 += loadu(x + k) * loadu(w + k);
    a1 += loadu(x + k + LANES) * loadu(w + k + LANES);
    a2 += loadu(x + k + 2 * LANES) * loadu(w + k + 2 * LANES);
    a3 += loadu(x + k + 3 * LANES) * loadu(w + k + 3 * LANES);
  }
  for (; k + LANES <= d; k += LANES) a0 += loadu(x + k) * loadu(w + k);
  a0 = (a0 + a1) + (a2 + a3);
#if LANES == 16
  float sum = _mm512_reduce_add_ps((__m512)a0);
#else
  float sum = 0;
  for (int i = 0; i < LANES; i++) sum += a0[i];
#endif
  for (; k < d; k++) sum += x[k] * w[k];
  return sum;
}

/* Norms of a vector, and of what was lost when it was narrowed. */
static void measure(const float *restrict x, const uint16_t *restrict h, int64_t d, double *size, double *lost) {
  vd whole = {0}, gone = {0};
  int64_t k = 0;
  for (; k + LANES <= d; k += LANES) {
    vf a = loadu(x + k), back;
    for (int l = 0; l < LANES; l++) back[l] = from_bfloat16(h[k + l]);
    vd b = __builtin_convertvector(a, vd), e = __builtin_convertvector(a - back, vd); /* a - back is exact */
    whole += b * b, gone += e * e;
  }
  double s = 0, g = 0;
  for (int l = 0; l < LANES; l++) s += whole[l], g += gone[l];
  for (; k < d; k++) {
    double e = (double)x[k] - from_bfloat16(h[k]);
    s += (double)x[k] * x[k], g += e * e;
  }
  *size = sqrt(s);
  *lost = sqrt(g);
}

/* -- products of a panel with MV columns --------------------------------------------------------------------------*/

/* z [MV, PANEL] = (or +=) w [MV, ldw] times x [d, PANEL]; what is added is summed by itself first */
static __attribute__((noinline)) void product(int64_t d, const float *restrict x, const float *restrict w, int64_t ldw,
                                              float *restrict z, int add) {
  vf acc[MV][NV];
  UNROLL for (int v = 0; v < MV; v++) UNROLL for (int i = 0; i < NV; i++) acc[v][i] = (vf){0};
  for (int64_t k = 0; k < d; k++) {
    vf a[NV];
    UNROLL for (int i = 0; i < NV; i++) a[i] = load(x + k * PANEL + i * LANES);
    UNROLL for (int v = 0; v < MV; v++) {
      float b = w[v * ldw + k];
      UNROLL for (int i = 0; i < NV; i++) acc[v][i] += a[i] * b;
    }
  }
  UNROLL for (int v = 0; v < MV; v++) UNROLL for (int i = 0; i < NV; i++) {
    float *to = z + v * PANEL + i * LANES;
    if (add) acc[v][i] += load(to);
    store(to, acc[v][i]);
  }
}

/* out [MV, PANEL] = sum over columns of w [columns, ldw] times weights [columns, PANEL] */
static __attribute__((noinline)) void combine(int64_t columns, const float *restrict weights, const float *restrict w,
                                              int64_t ldw, float *restrict out) {
  vf acc[MV][NV];
  UNROLL for (int v = 0; v < MV; v++) UNROLL for (int i = 0; i < NV; i++) acc[v][i] = (vf){0};
  for (int64_t c = 0; c < columns; c++) {
    vf a[NV];
    UNROLL for (int i = 0; i < NV; i++) a[i] = load(weights + c * PANEL + i * LANES);
    UNROLL for (int v = 0; v < MV; v++) {
      float b = w[c * ldw + v];
      UNROLL for (int i = 0; i < NV; i++) acc[v][i] += a[i] * b;
    }
  }
  UNROLL for (int v = 0; v < MV; v++) UNROLL for (int i = 0; i < NV; i++) store(out + v * PANEL + i * LANES, acc[v][i]);
}

#if HAS_BFLOAT16
/* `product` of pairs of bfloat16: x [d / 2, PANEL], w [MV, ldw]. */
static __attribute__((noinline)) void product_bfloat16(int64_t d2, const uint32_t *restrict x,
                                                       const uint32_t *restrict w, int64_t ldw, float *restrict z,
                                                       int add) {
  __m512 acc[MV][NV];
  UNROLL for (int v = 0; v < MV; v++) UNROLL for (int i = 0; i < NV; i++) acc[v][i] = _mm512_setzero_ps();
  for (int64_t k = 0; k < d2; k++) {
    __m512i a[NV];
    UNROLL for (int i = 0; i < NV; i++) a[i] = _mm512_load_si512(x + k * PANEL + i * LANES);
    UNROLL for (int v = 0; v < MV; v++) {
      __m512i b = _mm512_set1_epi32((int32_t)w[v * ldw + k]);
      UNROLL for (int i = 0; i < NV; i++) acc[v][i] = _mm512_dpbf16_ps(acc[v][i], (__m512bh)a[i], (__m512bh)b);
    }
  }
  UNROLL for (int v = 0; v < MV; v++) UNROLL for (int i = 0; i < NV; i++) {
    float *to = z + v * PANEL + i * LANES;
    vf sum = (vf)acc[v][i];
    if (add) sum += load(to);
    store(to, sum);
  }
}
#endif

/* -- best columns of a row: a heap whose root is the worst of them ------------------------------------------------ */

static void heap_push(float *restrict z, int32_t *restrict id, int64_t keep, float value, int32_t column) {
  int64_t i = 0;
  for (;;) {
    int64_t child = 2 * i + 1;
    if (child >= keep) break;
    if (child + 1 < keep && (z[child + 1] < z[child] || (z[child + 1] == z[child] && id[child + 1] > id[child]))) child++;
    if (!(z[child] < value || (z[child] == value && id[child] > column))) break;
    z[i] = z[child];
    id[i] = id[child];
    i = child;
  }
  z[i] = value;
  id[i] = column;
}

/* -- one block of rows over one slice of columns ------------------------------------------------------------------ */

/* What is known of PANEL rows so far. */
struct __attribute__((aligned(64))) panel {
  float max[PANEL];
  float worst[PANEL], worst_ranked[PANEL]; /* what a column has to exceed to be among the best */
  float size[PANEL];                       /* SCREENED: |x| times |scale| */
  float rough[PANEL];                      /* SCREENED: what a rough logit has to exceed to be computed again */
  float known[PANEL], known_worst[PANEL];  /* SCREENED: what the first slice found: log-sum-exp, worst of the best */
  double sum[PANEL], moment[PANEL], cross[PANEL];
  double tail[PANEL], tail_moment[PANEL], tail_cross[PANEL]; /* still to be multiplied by `size` */
  int64_t again[PANEL];
  int32_t row[PANEL]; /* -1 where there is none */
  int32_t place[PANEL];
  int32_t shift; /* the panel's first reference row in the tile's table, or -1: look each one up */
};

struct scratch {
  float *x, *ref_x;       /* packed rows: [panels, d, PANEL] */
  uint32_t *xb;           /* the same as pairs of bfloat16: [panels, d2, PANEL] */
  uint16_t *spare;        /* rows on their way there [PANEL, 2 d2] */
  float *w;               /* widened columns of a tile [tile, d] */
  uint32_t *wb;           /* the same as pairs of bfloat16 [tile, d2] */
  float *norm;            /* [tile] how far a rough logit can be off, by |x| */
  float *z;               /* [tile, PANEL] */
  uint32_t *done;         /* [tile] lanes whose rough logit has been computed again */
  float *ref_z, *ref_w;   /* [tile, wide] reference logits and probabilities */
  struct panel *panels;
  float *best_z, *ranked_z; /* [rows, keep] */
  int32_t *best_id, *ranked_id;
  float *low, *high;      /* [panels, targets, PANEL] */
  int32_t *count;         /* [panels, targets, PANEL] */
  int64_t wide;
  float ratio;            /* SCREENED: most that |x - x'| is of |x| */
  float most;             /* SCREENED: largest of all `norm` */
};

struct tile {
  int64_t start, count; /* columns */
  const float *w;       /* float32 columns */
  int64_t ldw;
};

/* Bias, scale, cap and offset, for logits [count, PANEL]. */
static void postmap(const struct job *j, float *restrict z, int64_t start, int64_t count) {
  if (!j->bias && !j->offset && j->scale == 1 && j->softcap == 0) return;
  float cap = (float)j->softcap, slope = (float)(j->softcap != 0 ? j->scale / j->softcap : j->scale);
  for (int64_t v = 0; v < count; v++) {
    float b = j->bias ? j->bias[start + v] : 0, o = j->offset ? j->offset[start + v] : 0;
    for (int i = 0; i < NV; i++) {
      float *p = z + v * PANEL + i * LANES;
      vf y = (load(p) + b) * slope;
      if (j->softcap != 0) y = vtanh(y) * cap;
      store(p, y + o);
    }
  }
}

#define DEPTH 192 /* of a product: a panel's part stays in the first cache, and short sums round less than long ones */

/* How many of the numbers that are left one product takes. */
INLINE int64_t depth(int64_t left) { return left < DEPTH + DEPTH / 2 ? left : DEPTH; /* no short rest */ }

/*
 * The most roundings that any product x_k w_k goes through on its way into a float32 logit; with n of them a logit is
 * off by at most n u / (1 - n u) |scale| |x| |w|, u = 2^-24 (Higham 2002, section 3.1; Cauchy and Schwarz).
 *
 *   product            `depth` terms in one chain from 0, a rounding each where products and sums are one instruction,
 *                      and one more for the product itself where they are not; then one for each chain added.
 *   product_bfloat16   the same with a pair for each step: both products of a pair are added, so two roundings a step.
 *   dot32              four chains of vectors, lanes (16 at most) put together, the rest one by one; never more than d.
 *   postmap            bias, scale (itself rounded to float32, and over the cap rounded once more), offset: 5. What they
 *                      add to the size of what is rounded is in `Head.extra_error`.
 */
static int64_t roundings(int64_t d, int bfloat16) {
  int64_t steps = bfloat16 ? (d + 1) / 2 : d, longest = 0, chains = 0, widest = d / (4 * LANES) + 4 + 2 + 2 * LANES;
  for (int64_t k = 0, some; k < steps; k += some, chains++) {
    some = depth(steps - k);
    if (some > longest) longest = some;
  }
  int64_t most = (bfloat16 ? 2 * longest : longest) + chains;
  if (widest > d) widest = d;
  return (most > widest ? most : widest) + 1 + 5;
}

static double roundings_part(int64_t d, int bfloat16) {
  double n = (double)roundings(d, bfloat16) * 0x1p-24;
  return n < 0.5 ? n / (1 - n) : INFINITY;
}

static void multiply(const struct job *j, const float *x, const struct tile *t, float *z) {
  for (int64_t k = 0; k < j->d; k += DEPTH) {
    int64_t d = depth(j->d - k);
    for (int64_t v = 0; v < t->count; v += MV) product(d, x + k * PANEL, t->w + v * t->ldw + k, t->ldw, z + v * PANEL, k > 0);
    if (d > DEPTH) break;
  }
}

static void multiply_bfloat16(const struct job *j, const uint32_t *x, const struct tile *t, const uint32_t *w, float *z) {
#if HAS_BFLOAT16
  int64_t d2 = (j->d + 1) / 2;
  for (int64_t k = 0; k < d2; k += DEPTH) {
    int64_t d = depth(d2 - k);
    for (int64_t v = 0; v < t->count; v += MV) product_bfloat16(d, x + k * PANEL, w + v * d2 + k, d2, z + v * PANEL, k > 0);
    if (d > DEPTH) break;
  }
#else
  (void)j, (void)x, (void)t, (void)w, (void)z;
#endif
}

/* Where the reference's numbers for lanes of a panel begin, for one column; gathered where they do not lie together. */
INLINE vf reference_lanes(const struct panel *p, const float *table, int i) {
  if (p->shift >= 0) return loadu(table + p->shift + i * LANES);
  vf out;
  for (int l = 0; l < LANES; l++) out[l] = table[p->place[i * LANES + l]];
  return out;
}

/* Compare with the targets, column by column; what is too close for float32 is settled in float64. */
static void rank_tile(const struct job *j, struct scratch *s, struct panel *p, int64_t number, const float *z,
                      const struct tile *t) {
  for (int64_t m = 0; m < j->targets; m++) {
    const float *low = s->low + (number * j->targets + m) * PANEL, *high = s->high + (number * j->targets + m) * PANEL;
    int32_t *count = s->count + (number * j->targets + m) * PANEL;
    for (int i = 0; i < NV; i++) {
      vf lo = load(low + i * LANES), hi = load(high + i * LANES);
      vi above_it = *(vi *)(count + i * LANES);
      for (int64_t v = 0; v < t->count; v++) {
        if (j->allowed && !j->allowed[t->start + v]) continue;
        vf y = load(z + v * PANEL + i * LANES);
        above_it -= (vi)(y > hi);
        uint32_t near = above(y, lo) & ~above(y, hi);
        while (near) {
          int lane = __builtin_ctz(near);
          near &= near - 1;
          int32_t row = p->row[i * LANES + lane];
          if (row < 0) continue;
          double mine = logit64(j, j->x + row * j->d, t->start + v), its = j->target_z[row * j->targets + m];
          double a = nearbyint(mine * 0x1p30), b = nearbyint(its * 0x1p30);
          above_it[lane] += a > b || (a == b && j->first + t->start + v < j->target_ids[row * j->targets + m]);
        }
      }
      *(vi *)(count + i * LANES) = above_it;
    }
  }
}

static void best_of_tile(const struct job *j, struct scratch *s, struct panel *p, int64_t number, const float *z,
                         const struct tile *t, int ranked) {
  float *worst = ranked ? p->worst_ranked : p->worst;
  int64_t keep = ranked ? j->keep_ranked : j->keep;
  float *best_z = (ranked ? s->ranked_z : s->best_z) + number * PANEL * keep;
  int32_t *best_id = (ranked ? s->ranked_id : s->best_id) + number * PANEL * keep;
  for (int64_t v = 0; v < t->count; v++) {
    if (ranked && !j->allowed[t->start + v]) continue;
    for (int i = 0; i < NV; i++) {
      uint32_t found = above(load(z + v * PANEL + i * LANES), load(worst + i * LANES));
      while (found) {
        int lane = i * LANES + __builtin_ctz(found);
        found &= found - 1;
        heap_push(best_z + lane * keep, best_id + lane * keep, keep, z[v * PANEL + lane], (int32_t)(j->first + t->start + v));
        worst[lane] = best_z[lane * keep];
      }
    }
  }
}

/* A little less than log(sum): log2(2^e (1 + f)) >= e + f. */
INLINE float log_below(double sum) {
  uint32_t u = float_bits((float)sum);
  return ((float)((int32_t)(u >> 23) - 127) + (float)(u & 0x7fffff) * 0x1p-23f) * 0.6931471f;
}

/* SCREENED: compute again, in float32, what can still matter. */
static void screen(const struct job *j, struct scratch *s, struct panel *p, int64_t number, float *z, const struct tile *t) {
#if HAS_BFLOAT16
  uint32_t alive = 0;
  for (int lane = 0; lane < PANEL; lane++) {
    float likely = p->max[lane] + log_below(p->sum[lane]);
    float worst = j->keep_ranked ? fminf(p->worst[lane], p->worst_ranked[lane]) : p->worst[lane];
    likely = fmaxf(likely, p->known[lane]) - j->theta;
    worst = fmaxf(worst, p->known_worst[lane]);
    int going = p->row[lane] >= 0 && (float)p->again[lane] <= j->patience;
    p->rough[lane] = going ? fminf(likely, worst) : INFINITY;
    alive |= (uint32_t)going << lane;
  }
  float least = expf(-j->theta_ref);
  float cap = (float)j->softcap, slope = (float)(j->softcap != 0 ? j->scale / j->softcap : j->scale);
  for (int64_t v = 0; v < t->count; v++) {
    uint32_t again = 0;
    for (int i = 0; i < NV; i++) {
      vf y = load(z + v * PANEL + i * LANES);
      vf off = load(p->size + i * LANES) * s->norm[v];
      uint32_t bits = above(y + off, load(p->rough + i * LANES));
      if (s->ref_w) bits |= above(reference_lanes(p, s->ref_w + v * s->wide, i), splat(least));
      for (int64_t m = 0; m < j->targets; m++) {
        const float *low = s->low + (number * j->targets + m) * PANEL, *high = s->high + (number * j->targets + m) * PANEL;
        bits |= above(y + off, load(low + i * LANES)) & ~above(y - off, load(high + i * LANES));
      }
      again |= bits << (i * LANES);
    }
    again &= alive;
    s->done[v] = again;
    while (again) {
      int lane = __builtin_ctz(again);
      again &= again - 1;
      int32_t row = p->row[lane];
      float y = dot32(j->x + row * j->d, t->w + v * t->ldw, j->d);
      if (j->bias) y += j->bias[t->start + v];
      y = j->softcap != 0 ? tanhf(y * slope) * cap : y * slope;
      z[v * PANEL + lane] = j->offset ? y + j->offset[t->start + v] : y;
      p->again[lane]++;
    }
  }
#else
  (void)j, (void)s, (void)p, (void)number, (void)z, (void)t;
#endif
}

#define SEGMENT 64 /* columns that are summed in float32 before float64 takes over */

INLINE vd widened(vf a) { return __builtin_convertvector(a, vd); }

/* Add a tile's columns to the sums. The flags are constants where this is called. */
INLINE void sum_tile(struct scratch *s, struct panel *p, const float *z, const struct tile *t, int kl, int rough) {
  for (int i = 0; i < NV; i++) {
    vf top = load(p->max + i * LANES);
    vd all_sum = {0}, all_moment = {0}, all_cross = {0}, all_tail = {0}, all_tail_moment = {0}, all_tail_cross = {0};
    for (int64_t start = 0; start < t->count; start += SEGMENT) {
      int64_t end = start + SEGMENT < t->count ? start + SEGMENT : t->count;
      vf sum[2] = {{0}}, moment[2] = {{0}}, cross[2] = {{0}}, tail = {0}, tail_moment = {0}, tail_cross = {0};
      for (int64_t v = start; v < end; v++) {
        vf y = load(z + v * PANEL + i * LANES);
        vf low = vmax(splat(-87.5f), y - top); /* exp is 0 there, and 0 times -inf would not be */
        vf e = vexp(low);
        sum[v & 1] += e;
        moment[v & 1] += e * low; /* NaN where y is, or is infinite: vmax gives its second argument then */
        vf weight = {0};
        if (kl) {
          weight = reference_lanes(p, s->ref_w + v * s->wide, i);
          cross[v & 1] += weight * (reference_lanes(p, s->ref_z + v * s->wide, i) - vmax(y, splat(-1e38f)));
        }
        if (rough) {
#if HAS_BFLOAT16
          __mmask16 left = (__mmask16)~(s->done[v] >> (i * LANES));
          vf off = (vf)_mm512_maskz_mov_ps(left, (__m512)splat(s->norm[v]));
          vf part = e * off;
          tail += part;
          tail_moment -= part * low;
          if (kl) tail_cross += weight * off;
#endif
        }
      }
      all_sum += widened(sum[0] + sum[1]);
      all_moment += widened(moment[0] + moment[1]);
      if (kl) all_cross += widened(cross[0] + cross[1]);
      if (rough) all_tail += widened(tail), all_tail_moment += widened(tail_moment);
      if (rough && kl) all_tail_cross += widened(tail_cross);
    }
    for (int l = 0; l < LANES; l++) {
      int lane = i * LANES + l;
      p->sum[lane] += all_sum[l];
      p->moment[lane] += all_moment[l];
      p->cross[lane] += all_cross[l];
      p->tail[lane] += all_tail[l];
      p->tail_moment[lane] += all_tail_moment[l];
      p->tail_cross[lane] += all_tail_cross[l];
    }
  }
}

static void accumulate(const struct job *j, struct scratch *s, struct panel *p, int64_t number, const float *z,
                       const struct tile *t, int rough) {
  uint32_t better = 0;
  for (int i = 0; i < NV; i++) {
    vf top = load(z + i * LANES);
    for (int64_t v = 1; v < t->count; v++) top = vmax(load(z + v * PANEL + i * LANES), top);
    if (above(top, load(p->worst + i * LANES))) better = 1;
    if (!above(top, load(p->max + i * LANES))) continue;
    for (int l = 0; l < LANES; l++) { /* sums are relative to the largest logit: it has grown */
      int lane = i * LANES + l;
      if (!(top[l] > p->max[lane])) continue;
      double shift = (double)p->max[lane] - top[l], old = exp(shift);
      p->moment[lane] = (p->moment[lane] + p->sum[lane] * shift) * old; /* NaN stays, and comes where top is infinite */
      p->tail_moment[lane] = p->tail[lane] > 0 ? (p->tail_moment[lane] - p->tail[lane] * shift) * old : 0;
      p->sum[lane] *= old;
      p->tail[lane] *= old;
      p->max[lane] = top[l];
    }
  }
  if (better) best_of_tile(j, s, p, number, z, t, 0);
  if (j->keep_ranked) best_of_tile(j, s, p, number, z, t, 1);
  if (j->targets) rank_tile(j, s, p, number, z, t);
  int kl = s->ref_w != NULL;
  if (kl && rough)
    sum_tile(s, p, z, t, 1, 1);
  else if (kl)
    sum_tile(s, p, z, t, 1, 0);
  else if (rough)
    sum_tile(s, p, z, t, 0, 1);
  else
    sum_tile(s, p, z, t, 0, 0);
}

/* Rows as a panel: column k of PANEL rows lies together. Rows that are not there are zero. */
static void pack(const float *x, int64_t d, const int32_t *rows, float *restrict out) {
  for (int64_t k = 0; k < d; k += 16) { /* a cache line of each row at a time */
    int64_t end = k + 16 < d ? k + 16 : d;
    for (int lane = 0; lane < PANEL; lane++) {
      if (rows[lane] < 0) {
        for (int64_t i = k; i < end; i++) out[i * PANEL + lane] = 0;
        continue;
      }
      const float *row = x + rows[lane] * d;
      for (int64_t i = k; i < end; i++) out[i * PANEL + lane] = row[i];
    }
  }
}

/* The same as pairs of bfloat16; gives the most that any row loses by it, as a part of its size. */
static double pack_bfloat16(const float *x, int64_t d, const int32_t *rows, uint32_t *restrict out, uint16_t *restrict spare) {
  double most = 0;
  int64_t d2 = (d + 1) / 2;
  for (int lane = 0; lane < PANEL; lane++) {
    uint16_t *h = spare + lane * 2 * d2;
    h[2 * d2 - 1] = 0;
    if (rows[lane] < 0) {
      memset(h, 0, (size_t)d2 * 4);
      continue;
    }
    const float *row = x + rows[lane] * d;
    narrow(row, d, h);
    double lost, size;
    measure(row, h, d, &size, &lost);
    if (size > 0 && lost / size > most) most = lost / size;
  }
  for (int64_t k = 0; k < d2; k += 16) {
    int64_t end = k + 16 < d2 ? k + 16 : d2;
    for (int lane = 0; lane < PANEL; lane++) {
      const uint32_t *h = (const uint32_t *)(spare + lane * 2 * d2);
      for (int64_t i = k; i < end; i++) out[i * PANEL + lane] = h[i];
    }
  }
  return most;
}

/* Columns of a tile in the form that the mode needs. */
static struct tile prepare(const struct job *j, struct scratch *s, int64_t start, int64_t count) {
  struct tile t = {start, count, s->w, j->d};
  int64_t full = (count + MV - 1) / MV * MV; /* the last product takes whole groups of MV columns */
  if (j->w_type == W_FLOAT32 && start + full <= j->columns) {
    t.w = (const float *)j->w + start * j->ldw;
    t.ldw = j->ldw;
  } else if (j->mode != BFLOAT16 || j->place) { /* in that mode only the reference is multiplied in float32 */
    for (int64_t v = 0; v < full; v++) {
      if (v < count)
        widen(j, start + v, s->w + v * j->d);
      else
        memset(s->w + v * j->d, 0, (size_t)j->d * 4);
    }
  }
  if (j->mode == EXACT) return t;
  int64_t d2 = (j->d + 1) / 2;
  /* Narrowed numbers are summed, which are up to 2^-8 larger each. */
  float slack = j->mode == SCREENED ? (float)(roundings_part(j->d, 1) * 1.01) : 0;
  for (int64_t v = 0; v < full; v++) {
    uint16_t *out = (uint16_t *)(s->wb + v * d2);
    out[2 * d2 - 1] = 0;
    if (v >= count)
      memset(out, 0, (size_t)d2 * 4);
    else if (j->w_type == W_BFLOAT16)
      memcpy(out, head_row(j, start + v), (size_t)j->d * 2);
    else
      narrow(t.w + v * t.ldw, j->d, out);
    if (j->mode != SCREENED || v >= count) continue;
    s->norm[v] = (j->w_size[start + v] * (s->ratio + slack) + j->w_lost[start + v] * (1 + s->ratio)) * (1 + 1e-6f);
    if (s->norm[v] > s->most) s->most = s->norm[v];
  }
  return t;
}

/* Logits and probabilities of the reference rows, in columns of a tile; repeated so that a panel's lie together. */
static void reference_tile(const struct job *j, struct scratch *s, int64_t b, int64_t slice, const struct tile *t) {
  int64_t first = j->ref_first[b], count = j->ref_count[b], wide = s->wide;
  for (int64_t q = 0; q * PANEL < count; q++) {
    multiply(j, s->ref_x + q * j->d * PANEL, t, s->z);
    postmap(j, s->z, t->start, t->count);
    for (int i = 0; i < NV; i++) {
      int64_t at = q * PANEL + i * LANES;
      vf lse = {0};
      for (int l = 0; l < LANES && at + l < count; l++) lse[l] = (float)j->ref_lse[first + at + l];
      for (int64_t v = 0; v < t->count; v++) {
        vf y = vmax(load(s->z + v * PANEL + i * LANES), splat(-1e38f));
        vf lower = y - lse;
        *(vfu *)(s->ref_z + v * wide + at) = y;
        *(vfu *)(s->ref_w + v * wide + at) = vexp(choose(lower > 0.0f, splat(0), vmax(lower, splat(-87.5f))));
      }
    }
  }
  for (int64_t r = 0; r < count; r++)
    for (int64_t c = 0; c < j->ref_keep; c++) {
      int64_t v = j->ref_ids[(first + r) * j->ref_keep + c] - j->first - t->start;
      if (v >= 0 && v < t->count) s->ref_w[v * wide + r] = 0;
    }
  if (j->ref_counts[b])
    for (int64_t v = 0; v < t->count; v++)
      for (int64_t r = 0; r < count; r++) j->mass[slice * j->n_ref + first + r] += s->ref_w[v * wide + r];
  for (int64_t v = 0; v < t->count; v++)
    for (int64_t r = count; r < count + PANEL; r++) {
      s->ref_z[v * wide + r] = s->ref_z[v * wide + r % count];
      s->ref_w[v * wide + r] = s->ref_w[v * wide + r % count];
    }
}

static void begin(const struct job *j, struct scratch *s, int64_t b, int64_t slice) {
  int64_t start = j->blocks[b], rows = j->blocks[b + 1] - start, d2 = (j->d + 1) / 2;
  double ratio = 0;
  for (int64_t q = 0; q * PANEL < rows; q++) {
    struct panel *p = s->panels + q;
    memset(p, 0, sizeof *p);
    p->shift = j->place ? j->place[j->order[start + q * PANEL]] - j->ref_first[b] : 0;
    for (int lane = 0; lane < PANEL; lane++) {
      int64_t at = q * PANEL + lane;
      int32_t row = at < rows ? j->order[start + at] : -1;
      p->row[lane] = row;
      p->max[lane] = -3.4e38f;
      p->known[lane] = p->known_worst[lane] = -INFINITY;
      p->worst[lane] = p->worst_ranked[lane] = row < 0 ? INFINITY : -INFINITY;
      p->place[lane] = j->place && row >= 0 ? j->place[row] - j->ref_first[b] : 0;
      if (j->place && row >= 0 && p->place[lane] != (p->shift + lane) % j->ref_count[b]) p->shift = -1;
      for (int64_t m = 0; m < j->targets; m++) {
        int64_t to = (q * j->targets + m) * PANEL + lane;
        s->low[to] = s->high[to] = INFINITY;
        s->count[to] = 0;
        if (row < 0) continue;
        double z = j->target_z[row * j->targets + m];
        s->low[to] = (float)(z - j->bound[row]);
        s->high[to] = (float)(z + j->bound[row]);
        /* the nearest float32 may lie inside; one step out it does not (`low` is exclusive) */
        s->low[to] = nextafterf(s->low[to], -INFINITY);
        s->high[to] = nextafterf(s->high[to], INFINITY);
      }
      if (j->mode != SCREENED || row < 0) continue;
      double size = 0;
      for (int64_t k = 0; k < j->d; k++) size += (double)j->x[row * j->d + k] * j->x[row * j->d + k];
      p->size[lane] = (float)(sqrt(size) * fabs(j->scale) * (1 + 1e-6));
      if (slice == 0) continue;
      p->known[lane] = j->max[row] + log_below(j->sum[row]);
      p->known_worst[lane] = j->keep_ranked ? fminf(j->best_z[row * j->keep], j->ranked_z[row * j->keep_ranked])
                                            : j->best_z[row * j->keep];
    }
    if (j->mode != BFLOAT16) pack(j->x, j->d, p->row, s->x + q * j->d * PANEL);
    if (j->mode != EXACT) {
      double lost = pack_bfloat16(j->x, j->d, p->row, s->xb + q * d2 * PANEL, s->spare);
      if (lost > ratio) ratio = lost;
    }
  }
  s->ratio = (float)(ratio * (1 + 1e-6));
  s->most = 0;
  int64_t lanes = (rows + PANEL - 1) / PANEL * PANEL;
  for (int64_t i = 0; i < lanes * j->keep; i++) s->best_z[i] = -INFINITY, s->best_id[i] = (int32_t)j->first;
  for (int64_t i = 0; i < lanes * j->keep_ranked; i++) s->ranked_z[i] = -INFINITY, s->ranked_id[i] = (int32_t)j->first;
  if (!j->place) return;
  for (int64_t q = 0; q * PANEL < j->ref_count[b]; q++) {
    int32_t numbers[PANEL];
    for (int lane = 0; lane < PANEL; lane++)
      numbers[lane] = q * PANEL + lane < j->ref_count[b] ? j->ref_first[b] + (int32_t)(q * PANEL + lane) : -1;
    pack(j->ref, j->d, numbers, s->ref_x + q * j->d * PANEL);
  }
}

static void finish(const struct job *j, struct scratch *s, int64_t b, int64_t slice) {
  int64_t rows = j->blocks[b + 1] - j->blocks[b];
  for (int64_t at = 0; at < rows; at++) {
    const struct panel *p = s->panels + at / PANEL;
    int lane = (int)(at % PANEL);
    int64_t to = slice * j->n + p->row[lane];
    j->max[to] = p->max[lane];
    j->sum[to] = p->sum[lane];
    j->moment[to] = p->moment[lane];
    if (j->cross) j->cross[to] = p->cross[lane];
    if (j->mode == SCREENED) {
      double size = p->size[lane];
      j->tail[to] = p->tail[lane] * size;
      j->tail_moment[to] = p->tail_moment[lane] * size;
      if (j->cross) j->tail_cross[to] = p->tail_cross[lane] * size;
      j->most[to] = (float)p->again[lane] <= j->patience ? size * s->most : INFINITY; /* given up: no bound holds */
      j->again[to] = p->again[lane];
    }
    memcpy(j->best_z + to * j->keep, s->best_z + at * j->keep, (size_t)j->keep * 4);
    memcpy(j->best_id + to * j->keep, s->best_id + at * j->keep, (size_t)j->keep * 4);
    if (j->keep_ranked) {
      memcpy(j->ranked_z + to * j->keep_ranked, s->ranked_z + at * j->keep_ranked, (size_t)j->keep_ranked * 4);
      memcpy(j->ranked_id + to * j->keep_ranked, s->ranked_id + at * j->keep_ranked, (size_t)j->keep_ranked * 4);
    }
    for (int64_t m = 0; m < j->targets; m++)
      j->before[to * j->targets + m] = s->count[(at / PANEL * j->targets + m) * PANEL + lane];
  }
}

static void piece(const struct job *j, struct scratch *s, int64_t b, int64_t slice) {
  int64_t rows = j->blocks[b + 1] - j->blocks[b], d2 = (j->d + 1) / 2;
  int64_t tiles = (j->columns + j->tile - 1) / j->tile;
  int64_t from = tiles * slice / j->slices, to = tiles * (slice + 1) / j->slices;
  begin(j, s, b, slice);
  for (int64_t i = from; i < to; i++) {
    int64_t start = i * j->tile, count = j->columns - start < j->tile ? j->columns - start : j->tile;
    struct tile t = prepare(j, s, start, count);
    if (j->place) reference_tile(j, s, b, slice, &t);
    int rough = j->mode == SCREENED && i > 0; /* before the first tile there is nothing to hold a logit against */
    for (int64_t q = 0; q * PANEL < rows; q++) {
      if (j->mode == BFLOAT16 || rough)
        multiply_bfloat16(j, s->xb + q * d2 * PANEL, &t, s->wb, s->z);
      else
        multiply(j, s->x + q * j->d * PANEL, &t, s->z);
      postmap(j, s->z, t.start, t.count);
      if (rough) screen(j, s, s->panels + q, q, s->z, &t);
      accumulate(j, s, s->panels + q, q, s->z, &t, rough);
    }
  }
  finish(j, s, b, slice);
}

/* What the slices found of a row, put together in slice 0. */
static void merge(const struct job *j, int64_t row) {
  for (int64_t slice = 1; slice < j->slices; slice++) {
    int64_t from = slice * j->n + row;
    double top = j->max[row] > j->max[from] ? j->max[row] : j->max[from];
    int64_t at[2] = {row, from};
    double sum = 0, moment = 0, tail = 0, tail_moment = 0;
    for (int i = 0; i < 2; i++) {
      double shift = (double)j->max[at[i]] - top, old = exp(shift);
      if (j->sum[at[i]] > 0 || j->moment[at[i]] != 0) /* or NaN */
        sum += j->sum[at[i]] * old, moment += (j->moment[at[i]] + j->sum[at[i]] * shift) * old;
      if (j->mode == SCREENED && j->tail[at[i]] > 0)
        tail += j->tail[at[i]] * old, tail_moment += (j->tail_moment[at[i]] - j->tail[at[i]] * shift) * old;
    }
    j->max[row] = (float)top;
    j->sum[row] = sum;
    j->moment[row] = moment;
    if (j->cross) j->cross[row] += j->cross[from];
    if (j->mode == SCREENED) {
      j->tail[row] = tail;
      j->tail_moment[row] = tail_moment;
      if (j->cross) j->tail_cross[row] += j->tail_cross[from];
      if (j->most[from] > j->most[row]) j->most[row] = j->most[from];
      j->again[row] += j->again[from];
    }
    for (int64_t i = 0; i < j->keep; i++)
      if (j->best_z[from * j->keep + i] > j->best_z[row * j->keep])
        heap_push(j->best_z + row * j->keep, j->best_id + row * j->keep, j->keep, j->best_z[from * j->keep + i],
                  j->best_id[from * j->keep + i]);
    for (int64_t i = 0; i < j->keep_ranked; i++)
      if (j->ranked_z[from * j->keep_ranked + i] > j->ranked_z[row * j->keep_ranked])
        heap_push(j->ranked_z + row * j->keep_ranked, j->ranked_id + row * j->keep_ranked, j->keep_ranked,
                  j->ranked_z[from * j->keep_ranked + i], j->ranked_id[from * j->keep_ranked + i]);
    for (int64_t m = 0; m < j->targets; m++) j->before[row * j->targets + m] += j->before[from * j->targets + m];
  }
}

/* -- threads ------------------------------------------------------------------------------------------------------ */

static void *room(int64_t elements, int64_t size) {
  size_t bytes = ((size_t)(elements > 0 ? elements : 1) * (size_t)size + 127) / 64 * 64;
  return aligned_alloc(64, bytes);
}

static void leave(struct scratch *s) {
  void *all[] = {s->x,    s->ref_x, s->xb, s->spare, s->w,      s->wb,       s->norm,    s->z,         s->done,  s->ref_z,
                 s->ref_w, s->panels, s->best_z, s->best_id, s->ranked_z, s->ranked_id, s->low, s->high, s->count};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

static int enter(const struct job *j, struct scratch *s) {
  memset(s, 0, sizeof *s);
  int64_t rows = 1, refs = 0, d2 = (j->d + 1) / 2, tile = (j->tile + MV - 1) / MV * MV;
  for (int64_t b = 0; b < j->n_blocks; b++) {
    if (j->blocks[b + 1] - j->blocks[b] > rows) rows = j->blocks[b + 1] - j->blocks[b];
    if (j->place && j->ref_count[b] > refs) refs = j->ref_count[b];
  }
  int64_t panels = (rows + PANEL - 1) / PANEL, ref_panels = (refs + PANEL - 1) / PANEL;
  s->wide = (ref_panels + 1) * PANEL;
  s->panels = room(panels, sizeof(struct panel));
  s->z = room(tile * PANEL, 4);
  s->done = room(tile, 4);
  s->norm = room(tile, 4);
  s->best_z = room(panels * PANEL * j->keep, 4);
  s->best_id = room(panels * PANEL * j->keep, 4);
  s->ranked_z = room(panels * PANEL * j->keep_ranked, 4);
  s->ranked_id = room(panels * PANEL * j->keep_ranked, 4);
  s->low = room(panels * j->targets * PANEL, 4);
  s->high = room(panels * j->targets * PANEL, 4);
  s->count = room(panels * j->targets * PANEL, 4);
  int fine = s->panels && s->z && s->done && s->norm && s->best_z && s->best_id && s->ranked_z && s->ranked_id && s->low &&
             s->high && s->count;
  fine = fine && (s->w = room(tile * j->d, 4));
  if (j->mode != BFLOAT16) fine = fine && (s->x = room(panels * j->d * PANEL, 4));
  if (j->mode != EXACT) fine = fine && (s->xb = room(panels * d2 * PANEL, 4)) && (s->wb = room(tile * d2, 4)) && (s->spare = room(PANEL * d2, 4));
  if (j->place)
    fine = fine && (s->ref_x = room(ref_panels * j->d * PANEL, 4)) && (s->ref_z = room(tile * s->wide, 4)) &&
           (s->ref_w = room(tile * s->wide, 4));
  return fine;
}

struct crew {
  const struct job *job;
  atomic_llong next;
  atomic_int failed;
  int64_t first, pieces; /* of this turn */
};

static void *scan_work(void *argument) {
  struct crew *c = argument;
  const struct job *j = c->job;
  struct scratch s;
  if (enter(j, &s)) {
    for (int64_t i; (i = c->first + atomic_fetch_add(&c->next, 1)) < c->first + c->pieces;)
      piece(j, &s, i % j->n_blocks, i / j->n_blocks);
  } else {
    atomic_store(&c->failed, 1);
  }
  leave(&s);
  return NULL;
}

static void *merge_work(void *argument) {
  struct crew *c = argument;
  enum { ROWS = 64 };
  for (int64_t i; (i = atomic_fetch_add(&c->next, 1)) * ROWS < c->job->n;)
    for (int64_t row = i * ROWS; row < c->job->n && row < (i + 1) * ROWS; row++) merge(c->job, row);
  return NULL;
}

enum { MOST_THREADS = 1024 };

static int together(struct crew *c, void *(*fn)(void *), int64_t threads) {
  pthread_t others[MOST_THREADS];
  int64_t started = 0;
  atomic_store(&c->next, 0);
  for (int64_t i = 1; i < threads && i < MOST_THREADS; i++) /* fewer threads than asked for are no fault */
    if (pthread_create(&others[started], NULL, fn, c) == 0) started++;
  fn(c);
  for (int64_t i = 0; i < started; i++) pthread_join(others[i], NULL);
  return atomic_load(&c->failed);
}

/* -- what Python calls -------------------------------------------------------------------------------------------- */

struct facts {
  int64_t abi, job_size, panel, columns, bfloat16;
};

void logitlab_facts(struct facts *f) {
  *f = (struct facts){ABI, sizeof(struct job), PANEL, MV, HAS_BFLOAT16};
}

/* By how much a logit can be off by rounding, as a part of |scale| |x| |w|; see `roundings`. */
double logitlab_rounding(int64_t d, int64_t bfloat16) { return roundings_part(d, bfloat16 != 0); }

/* Scan; 0 when done, 1 when memory ran out, 2 when this machine has no such mode. */
int logitlab_scan(const struct job *j) {
  if (j->mode != EXACT && !HAS_BFLOAT16) return 2;
  struct crew c = {.job = j, .pieces = j->n_blocks * j->slices};
  if (j->mode == SCREENED && j->slices > 1) { /* what the first slice finds tells the others what can matter */
    c.pieces = j->n_blocks;
    if (together(&c, scan_work, j->threads < c.pieces ? j->threads : c.pieces)) return 1;
    c.first = j->n_blocks;
    c.pieces = j->n_blocks * (j->slices - 1);
  }
  if (together(&c, scan_work, j->threads < c.pieces ? j->threads : c.pieces)) return 1;
  if (j->slices > 1) together(&c, merge_work, j->n / 64 < j->threads ? j->n / 64 + 1 : j->threads);
  return 0;
}

struct means {
  struct crew crew;
  double *mean, *mass; /* [slices, n, d], [slices, n] */
};

static void mean_piece(const struct job *j, struct means *a, int64_t q, int64_t slice, float *x, float *z, float *part,
                       double *sum, struct scratch *s) {
  int32_t rows[PANEL];
  double mass[PANEL] = {0};
  for (int lane = 0; lane < PANEL; lane++) rows[lane] = q * PANEL + lane < j->n ? (int32_t)(q * PANEL + lane) : -1;
  pack(j->x, j->d, rows, x);
  memset(sum, 0, (size_t)(j->d * PANEL) * sizeof *sum);
  int64_t tiles = (j->columns + j->tile - 1) / j->tile;
  for (int64_t i = tiles * slice / j->slices; i < tiles * (slice + 1) / j->slices; i++) {
    int64_t start = i * j->tile, count = j->columns - start < j->tile ? j->columns - start : j->tile;
    struct tile t = prepare(j, s, start, count);
    multiply(j, x, &t, z);
    postmap(j, z, start, count);
    for (int l = 0; l < NV; l++) {
      vf lse = {0};
      for (int k = 0; k < LANES; k++) lse[k] = rows[l * LANES + k] < 0 ? INFINITY : (float)j->ref_lse[rows[l * LANES + k]];
      for (int64_t v = 0; v < count; v++) {
        float *to = z + v * PANEL + l * LANES;
        vf lower = load(to) - lse;
        store(to, vexp(choose(lower > 0.0f, splat(0), vmax(lower, splat(-87.5f)))));
      }
    }
    for (int lane = 0; lane < PANEL; lane++) {
      if (rows[lane] < 0) continue;
      for (int64_t c = 0; c < j->ref_keep; c++) {
        int64_t v = j->ref_ids[rows[lane] * j->ref_keep + c] - j->first - start;
        if (v >= 0 && v < count) z[v * PANEL + lane] = 0;
      }
      for (int64_t v = 0; v < count; v++) mass[lane] += z[v * PANEL + lane];
    }
    for (int64_t k = 0; k < j->d; k += MV) {
      int64_t some = j->d - k < MV ? j->d - k : MV;
      if (some == MV) {
        combine(count, z, t.w + k, t.ldw, part);
      } else { /* the last coordinates, where a whole group of them would reach beyond the row */
        memset(part, 0, MV * PANEL * sizeof *part);
        for (int64_t v = 0; v < count; v++)
          for (int64_t o = 0; o < some; o++)
            for (int lane = 0; lane < PANEL; lane++) part[o * PANEL + lane] += t.w[v * t.ldw + k + o] * z[v * PANEL + lane];
      }
      for (int64_t o = 0; o < some * PANEL; o++) sum[k * PANEL + o] += part[o];
    }
  }
  for (int lane = 0; lane < PANEL; lane++) {
    if (rows[lane] < 0) continue;
    int64_t to = slice * j->n + rows[lane];
    a->mass[to] = mass[lane];
    for (int64_t k = 0; k < j->d; k++) a->mean[to * j->d + k] = sum[k * PANEL + lane];
  }
}

static void *mean_work(void *argument) {
  struct means *a = argument;
  const struct job *j = a->crew.job;
  int64_t panels = (j->n + PANEL - 1) / PANEL, tile = (j->tile + MV - 1) / MV * MV;
  struct scratch s = {.w = room(tile * j->d, 4)};
  float *x = room(j->d * PANEL, 4), *z = room(tile * PANEL, 4), *part = room(MV * PANEL, 4);
  double *sum = room(j->d * PANEL, 8);
  if (s.w && x && z && part && sum)
    for (int64_t i; (i = atomic_fetch_add(&a->crew.next, 1)) < panels * j->slices;)
      mean_piece(j, a, i % panels, i / panels, x, z, part, sum, &s);
  else
    atomic_store(&a->crew.failed, 1);
  free(s.w), free(x), free(z), free(part), free(sum);
  return NULL;
}

/*
 * The head's rows in the mean that the distribution of each row of x takes of them, its columns `ref_ids` left out:
 * sums of weights exp(z - ref_lse) times rows, and of weights; [slices, n, d] and [slices, n].
 */
int logitlab_means(const struct job *j, double *mean, double *mass) {
  struct means a = {.crew = {.job = j}, .mean = mean, .mass = mass};
  int64_t pieces = (j->n + PANEL - 1) / PANEL * j->slices;
  return together(&a.crew, mean_work, j->threads < pieces ? j->threads : pieces);
}

/* -- the head's rows in expectation ------------------------------------------------------------------------------- */

/*
 * The mean that the softmax of each row takes of the head's rows, and its log-sum-exp, in one pass: each tile's logits
 * are turned into weights and multiplied with the tile again, and what was summed before is scaled down where a logit
 * exceeds what weights are relative to by more than GROWTH. Weights are relative to the largest logit of the first
 * tile, not to the largest of all so far: scaling is then seldom needed, and float32 and bfloat16 reach far enough.
 */
#define GROWTH 60.0f

struct expectation {
  struct crew crew;
  float *mean; /* [slices, n, d] */
  double *lse; /* [slices, n] */
};

struct expecting {
  float *x;              /* EXACT: packed rows [panels, d, PANEL] */
  uint32_t *xb;          /* BFLOAT16: the same as pairs [panels, d2, PANEL] */
  uint16_t *spare;       /* [PANEL, 2 d2] */
  float *w;              /* widened columns of a tile [tile, d]; in BFLOAT16 one of them */
  uint32_t *wb;          /* BFLOAT16: columns of a tile as pairs of coordinates [tile, d2] */
  uint32_t *wt;          /* BFLOAT16: coordinates as pairs of columns [d, tile / 2] */
  float *z;              /* [tile, PANEL] logits, then weights */
  uint32_t *pairs;       /* BFLOAT16: weights as pairs of columns [tile / 2, PANEL] */
  float *part;           /* [MV, PANEL] */
  float *mean;           /* [panels, d, PANEL] */
  float *pivot;          /* [panels, PANEL] */
  double *sum, *used;    /* [panels, PANEL] of weights, and of weights as they were multiplied */
};

/* Whole groups of MV, which products take, and whole pairs. */
INLINE int64_t whole(int64_t count) { return (count + 2 * MV - 1) / (2 * MV) * (2 * MV); }

/* Columns of a tile; those beyond the last are zero. */
static struct tile expect_tile(const struct job *j, struct expecting *e, int64_t start, int64_t count) {
  struct tile t = {start, count, e->w, j->d};
  int64_t full = whole(count), d2 = (j->d + 1) / 2;
  if (j->mode == EXACT) {
    if (j->w_type == W_FLOAT32 && start + full <= j->columns) {
      t.w = (const float *)j->w + start * j->ldw;
      t.ldw = j->ldw;
      return t;
    }
    for (int64_t v = 0; v < count; v++) widen(j, start + v, e->w + v * j->d);
    memset(e->w + count * j->d, 0, (size_t)((full - count) * j->d) * 4);
    return t;
  }
  for (int64_t v = 0; v < full; v++) {
    uint16_t *out = (uint16_t *)(e->wb + v * d2);
    out[2 * d2 - 1] = 0;
    if (v >= count) {
      memset(out, 0, (size_t)d2 * 4);
    } else if (j->w_type == W_BFLOAT16) {
      memcpy(out, head_row(j, start + v), (size_t)j->d * 2);
    } else if (j->w_type == W_FLOAT32) {
      narrow(head_row(j, start + v), j->d, out);
    } else {
      widen(j, start + v, e->w);
      narrow(e->w, j->d, out);
    }
  }
  enum { SIDE = 16 };
  int64_t half = full / 2;
  for (int64_t k = 0; k < j->d; k += SIDE)
    for (int64_t v = 0; v < half; v += SIDE)
      for (int64_t a = k; a < k + SIDE && a < j->d; a++)
        for (int64_t b = v; b < v + SIDE && b < half; b++) {
          const uint16_t *low = (const uint16_t *)(e->wb + 2 * b * d2), *high = (const uint16_t *)(e->wb + (2 * b + 1) * d2);
          e->wt[a * half + b] = low[a] | (uint32_t)high[a] << 16;
        }
  return t;
}

/* Weights of a panel in place of its logits, and their sum; those of columns that are not there are zero. */
static void weigh(const struct job *j, struct expecting *e, int64_t q, const struct tile *t, int first) {
  int64_t full = whole(t->count);
  for (int i = 0; i < NV; i++) {
    float *z = e->z + i * LANES, *pivot = e->pivot + q * PANEL + i * LANES;
    double *sum = e->sum + q * PANEL + i * LANES, *used = e->used + q * PANEL + i * LANES;
    vf top = load(z);
    for (int64_t v = 1; v < t->count; v++) top = vmax(load(z + v * PANEL), top);
    top = vmax(top, splat(-1e30f)); /* of a tile that is ruled out as a whole */
    if (first) store(pivot, top);
    vf from = load(pivot);
    if (above(top, from + GROWTH)) {
      vf to = choose(top > from + GROWTH, top, from), scale = vexp(from - to);
      store(pivot, to);
      for (int l = 0; l < LANES; l++) sum[l] *= (double)scale[l], used[l] *= (double)scale[l];
      float *mean = e->mean + q * j->d * PANEL + i * LANES;
      for (int64_t k = 0; k < j->d; k++) store(mean + k * PANEL, load(mean + k * PANEL) * scale);
      from = to;
    }
    for (int64_t start = 0; start < t->count; start += SEGMENT) {
      int64_t end = start + SEGMENT < t->count ? start + SEGMENT : t->count;
      vf part[2] = {{0}}, rounded[2] = {{0}};
      for (int64_t v = start; v < end; v++) {
        vf y = load(z + v * PANEL), low = vmax(splat(-87.5f), y - from), p = vexp(low);
        p = choose(low == low, p, low);
        part[v & 1] += p;
        if (j->mode != EXACT) {
          vi bits = (vi)p;
          p = (vf)((bits + 0x7fff + ((bits >> 16) & 1)) & (int32_t)0xffff0000);
          rounded[v & 1] += p;
        }
        store(z + v * PANEL, p);
      }
      vd both = widened(part[0] + part[1]), taken = j->mode == EXACT ? both : widened(rounded[0] + rounded[1]);
      for (int l = 0; l < LANES; l++) sum[l] += both[l], used[l] += taken[l];
    }
    for (int64_t v = t->count; v < full; v++) store(z + v * PANEL, splat(0));
    if (j->mode == EXACT) continue;
    for (int64_t v = 0; v < full; v += 2) {
      vi low = (vi)load(z + v * PANEL), high = (vi)load(z + (v + 1) * PANEL); /* rounded above */
      *(vi *)(e->pairs + v / 2 * PANEL + i * LANES) = ((low >> 16) & 0xffff) | (high & (int32_t)0xffff0000);
    }
  }
}

/* Add a tile's columns, each times its weight. */
static void add_weighed(const struct job *j, struct expecting *e, int64_t q, const struct tile *t) {
  float *mean = e->mean + q * j->d * PANEL;
  int64_t full = whole(t->count);
  for (int64_t k = 0; k < j->d; k += MV) {
    int64_t some = j->d - k < MV ? j->d - k : MV;
    if (some < MV) { /* the last coordinates, where a whole group of them would reach beyond the row */
      memset(e->part, 0, MV * PANEL * sizeof *e->part);
      for (int64_t o = 0; o < some; o++)
        for (int64_t v = 0; v < t->count; v++) {
          uint16_t h = j->mode == EXACT ? 0 : ((const uint16_t *)(e->wb + v * ((j->d + 1) / 2)))[k + o];
          float w = j->mode == EXACT ? t->w[v * t->ldw + k + o] : from_bfloat16(h);
          for (int lane = 0; lane < PANEL; lane++) e->part[o * PANEL + lane] += w * e->z[v * PANEL + lane];
        }
    } else if (j->mode == EXACT) {
      combine(t->count, e->z, t->w + k, t->ldw, e->part);
    } else {
#if HAS_BFLOAT16
      product_bfloat16(full / 2, e->pairs, e->wt + k * (full / 2), full / 2, mean + k * PANEL, 1);
#endif
      continue;
    }
    for (int64_t o = 0; o < some * PANEL; o++) mean[k * PANEL + o] += e->part[o];
  }
}

static void expect_piece(const struct job *j, struct expectation *a, int64_t b, int64_t slice, struct expecting *e) {
  int64_t from = j->blocks[b], rows = j->blocks[b + 1] - from, d2 = (j->d + 1) / 2;
  int64_t panels = (rows + PANEL - 1) / PANEL, tiles = (j->columns + j->tile - 1) / j->tile;
  for (int64_t q = 0; q < panels; q++) {
    int32_t own[PANEL];
    for (int lane = 0; lane < PANEL; lane++) own[lane] = q * PANEL + lane < rows ? (int32_t)(from + q * PANEL + lane) : -1;
    if (j->mode == EXACT)
      pack(j->x, j->d, own, e->x + q * j->d * PANEL);
    else
      pack_bfloat16(j->x, j->d, own, e->xb + q * d2 * PANEL, e->spare);
  }
  memset(e->mean, 0, (size_t)(panels * j->d * PANEL) * sizeof *e->mean);
  memset(e->sum, 0, (size_t)(panels * PANEL) * sizeof *e->sum);
  memset(e->used, 0, (size_t)(panels * PANEL) * sizeof *e->used);
  int64_t first = tiles * slice / j->slices;
  for (int64_t i = first; i < tiles * (slice + 1) / j->slices; i++) {
    int64_t start = i * j->tile, count = j->columns - start < j->tile ? j->columns - start : j->tile;
    struct tile t = expect_tile(j, e, start, count);
    for (int64_t q = 0; q < panels; q++) {
      if (j->mode == EXACT)
        multiply(j, e->x + q * j->d * PANEL, &t, e->z);
      else
        multiply_bfloat16(j, e->xb + q * d2 * PANEL, &t, e->wb, e->z);
      postmap(j, e->z, start, count);
      weigh(j, e, q, &t, i == first);
      add_weighed(j, e, q, &t);
    }
  }
  for (int64_t row = 0; row < rows; row++) {
    int64_t q = row / PANEL, lane = row % PANEL, to = slice * j->n + from + row;
    double sum = e->sum[row];
    a->lse[to] = sum > 0 ? e->pivot[row] + log(sum) : sum == 0 ? -INFINITY : NAN;
    float part = sum > 0 ? (float)(1 / e->used[row]) : sum == 0 ? 0 : NAN;
    for (int64_t k = 0; k < j->d; k++) a->mean[to * j->d + k] = e->mean[(q * j->d + k) * PANEL + lane] * part;
  }
}

static void *expect_work(void *argument) {
  struct expectation *a = argument;
  const struct job *j = a->crew.job;
  int64_t rows = 1, d2 = (j->d + 1) / 2, tile = whole(j->tile), narrowed = j->mode != EXACT;
  for (int64_t b = 0; b < j->n_blocks; b++)
    if (j->blocks[b + 1] - j->blocks[b] > rows) rows = j->blocks[b + 1] - j->blocks[b];
  int64_t panels = (rows + PANEL - 1) / PANEL;
  struct expecting e = {
      .x = room(narrowed ? 0 : panels * j->d * PANEL, 4),
      .xb = room(narrowed ? panels * d2 * PANEL : 0, 4),
      .spare = room(narrowed ? PANEL * d2 : 0, 4),
      .w = room((narrowed ? 1 : tile) * j->d, 4),
      .wb = room(narrowed ? tile * d2 : 0, 4),
      .wt = room(narrowed ? j->d * tile / 2 : 0, 4),
      .z = room(tile * PANEL, 4),
      .pairs = room(narrowed ? tile / 2 * PANEL : 0, 4),
      .part = room(MV * PANEL, 4),
      .mean = room(panels * j->d * PANEL, 4),
      .pivot = room(panels * PANEL, 4),
      .sum = room(panels * PANEL, 8),
      .used = room(panels * PANEL, 8),
  };
  void *all[] = {e.x, e.xb, e.spare, e.w, e.wb, e.wt, e.z, e.pairs, e.part, e.mean, e.pivot, e.sum, e.used};
  int fine = 1;
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) fine = fine && all[i];
  if (fine)
    for (int64_t i; (i = atomic_fetch_add(&a->crew.next, 1)) < j->n_blocks * j->slices;)
      expect_piece(j, a, i % j->n_blocks, i / j->n_blocks, &e);
  else
    atomic_store(&a->crew.failed, 1);
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
  return NULL;
}

/*
 * The head's rows in the mean that the softmax of each row of x takes of them, and its log-sum-exp; [slices, n, d] and
 * [slices, n], each over the columns of its slice. The mode is EXACT or BFLOAT16, where rows, head and weights are all
 * rounded to bfloat16, and summed in float32. 0 when done, 1 when memory ran out, 2 when there is no such mode here.
 */
int logitlab_expect(const struct job *j, float *mean, double *lse) {
  if (j->mode != EXACT && !HAS_BFLOAT16) return 2;
  struct expectation a = {.crew = {.job = j}, .mean = mean, .lse = lse};
  int64_t pieces = j->n_blocks * j->slices;
  return together(&a.crew, expect_work, j->threads < pieces ? j->threads : pieces);
}

struct sizes {
  struct crew crew;
  float *size, *lost;
};

static void *size_work(void *argument) {
  struct sizes *a = argument;
  const struct job *j = a->crew.job;
  enum { COLUMNS = 256 };
  float *w = room(j->d, 4);
  uint16_t *h = room(j->d, 2);
  if (!w || !h) atomic_store(&a->crew.failed, 1);
  for (int64_t i; w && h && (i = atomic_fetch_add(&a->crew.next, 1)) * COLUMNS < j->columns;)
    for (int64_t v = i * COLUMNS; v < j->columns && v < (i + 1) * COLUMNS; v++) {
      widen(j, v, w);
      narrow(w, j->d, h);
      double size, lost;
      measure(w, h, j->d, &size, &lost);
      a->size[v] = (float)size * (1 + 1e-6f);
      a->lost[v] = (float)lost * (1 + 1e-6f);
    }
  free(w), free(h);
  return NULL;
}

/* Of each column its Euclidean norm, and the norm of what rounding it to bfloat16 takes away; [columns] each. */
int logitlab_sizes(const struct job *j, float *size, float *lost) {
  struct sizes a = {.crew = {.job = j}, .size = size, .lost = lost};
  return together(&a.crew, size_work, j->columns / 256 < j->threads ? j->columns / 256 + 1 : j->threads);
}

struct pairs {
  struct crew crew;
  const int64_t *ids;
  int64_t per_row;
  double *out;
};

static void *pair_work(void *argument) {
  struct pairs *a = argument;
  const struct job *j = a->crew.job;
  enum { ROWS = 16 };
  for (int64_t i; (i = atomic_fetch_add(&a->crew.next, 1)) * ROWS < j->n;)
    for (int64_t row = i * ROWS; row < j->n && row < (i + 1) * ROWS; row++)
      for (int64_t c = 0; c < a->per_row; c++)
        a->out[row * a->per_row + c] = logit64(j, j->x + row * j->d, a->ids[row * a->per_row + c] - j->first);
  return NULL;
}

/* Float64 logits of chosen columns, ids [n, per_row] -> out [n, per_row]. */
int logitlab_logits_at(const struct job *j, const int64_t *ids, int64_t per_row, double *out) {
  struct pairs a = {.crew = {.job = j}, .ids = ids, .per_row = per_row, .out = out};
  return together(&a.crew, pair_work, j->n / 16 < j->threads ? j->n / 16 + 1 : j->threads);
}

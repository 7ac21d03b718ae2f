// Each site's rows in time order against what its open run is compared with. Launch 1 finds where each video's sites
// begin and answers for the rows without one; in launch 2 a team of warps walks one site, a warp per 512 columns, with
// the reference in registers and the next rows on their way. There are only as many teams as sites: 196 of them on 132
// multiprocessors still have some 4 MB of rows in flight.
#pragma once

#include "common/canonical.cuh"
#include "common/scan.h"

namespace vtok {

constexpr int kGateThreads = 256;  // of launch 1
constexpr int kGateAhead = 2;      // rows on their way from memory

// Warps of a block at most: half of them where rows are read value by value, which takes registers. Longer rows are
// taken in several parts, with the reference in next_rows.
template <class A, bool kPlain>
constexpr int kGateWarps = (kPlain ? 64 : 32) / sizeof(A);

template <class T>
struct TemporalGateArgs {
  using A = accumulator_t<T>;
  const T* tokens;  // [rows, D], rows `stride` values apart
  int64_t rows, stride, D;
  const int64_t *cu_seqlens, *tokens_per_frame;  // [videos + 1], [videos]: any values, none leads outside a tensor
  int64_t videos, sites;
  A threshold, eps;
  int64_t refresh;
  bool previous, mean;        // what a row is compared with; neither: the one that opened the run
  const A* state_rows;        // [sites, D]
  const float* state_weight;  // [sites]
  const int64_t* state_step;  // [videos], or null: all videos start anew
  uint8_t* keep;              // [rows]
  A* similarity;              // [rows]
  A* next_rows;               // as state_rows
  float* next_weight;
  int64_t *next_step, *site_begin;  // site_begin: [videos + 1], ascending, at most `sites`
};

// Where video v begins.
template <class T>
VTOK_DEVICE int64_t video_begin(const TemporalGateArgs<T>& args, int64_t v) {
  const int64_t begin = args.cu_seqlens[v];
  return begin < 0 ? 0 : begin < args.rows ? begin : args.rows;
}

template <class T>
VTOK_DEVICE int64_t frames_before(const TemporalGateArgs<T>& args, int64_t v) {
  return args.state_step && args.state_step[v] > 0 ? args.state_step[v] : 0;
}

template <class T>
__global__ void __launch_bounds__(kGateThreads) temporal_gate_layout_kernel(TemporalGateArgs<T> args) {
  using A = accumulator_t<T>;
  struct Sums {
    int64_t of[kGateThreads / kWarp];
  };
  VTOK_SHARED(Sums, sums);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kGateThreads + threadIdx.x;
  const int64_t last = video_begin(args, args.videos), threads = static_cast<int64_t>(gridDim.x) * kGateThreads;
  for (int64_t s = thread; s < args.rows; s += threads) {  // as if no row had a site; launch 2 knows better
    args.keep[s] = s < last;
    args.similarity[s] = -static_cast<A>(INFINITY);
  }
  int64_t before = 0;
  for (int64_t base = 0; blockIdx.x == 0 && base < args.videos; base += kGateThreads) {
    const int64_t v = base + threadIdx.x, given = v < args.videos ? args.tokens_per_frame[v] : 0;
    const int64_t own = given < 0 ? 0 : given < args.sites ? given : args.sites;
    int64_t total;
    const int64_t begin = before + block_scan<kGateThreads>(own, sums.of, total);
    before += total;
    if (v >= args.videos) continue;
    args.site_begin[v] = begin < args.sites ? begin : args.sites;
    const int64_t count = video_begin(args, v + 1) - video_begin(args, v);
    args.next_step[v] = frames_before(args, v) + (given > 0 && count > 0 ? (count - 1) / given + 1 : 0);
  }
  if (thread == 0) args.site_begin[args.videos] = before < args.sites ? before : args.sites;
}

// A site's walk, in shared memory: rows first, first + stride, ...
struct alignas(16) TemporalGateSite {
  int64_t first, stride, frames;
  int64_t phase;  // of the first frame in the cycle of refreshes, whose phase is 0; 1 where there is none
  float weight;   // rows in the run that is open at the start; 0: nothing to compare with
};

// Fills in a site, by one warp: it searches 32 videos at a time for the last one that begins there or earlier.
template <class T>
VTOK_DEVICE void find_site(const TemporalGateArgs<T>& args, int64_t site, TemporalGateSite& out) {
  int64_t v = 0, high = args.videos + 1;
  while (high - v > 1) {
    const int64_t step = (high - v + kWarp - 1) / kWarp, probe = v + step * (threadIdx.x + 1);
    const int passed = __popc(__ballot_sync(kFullMask, probe < high && args.site_begin[probe] <= site));
    v += step * passed;
    high = v + step < high ? v + step : high;
  }
  if (threadIdx.x != 0) return;
  out = TemporalGateSite{0, 0, 0, 1, 0};
  if (v >= args.videos) return;
  const int64_t place = site - args.site_begin[v], begin = video_begin(args, v), step = frames_before(args, v);
  const int64_t left = video_begin(args, v + 1) - begin - place, frame = args.tokens_per_frame[v];
  out.first = begin + place;
  out.stride = frame;
  out.frames = left > 0 ? (left - 1) / frame + 1 : 0;
  if (args.refresh > 0) out.phase = step % args.refresh;
  if (step > 0 && args.state_weight[site] > 0) out.weight = args.state_weight[site];
}

// The mean of a run's rows, from their sum.
template <class A>
VTOK_DEVICE void divide(Fragment<A>& sum, A weight) {
#pragma unroll
  for (int step = 0; step < kCanonicalSteps; ++step)
    sum.words[step] = {div_rn(sum.words[step].x, weight), div_rn(sum.words[step].y, weight)};
}

// The row opens the run, or is added to it.
template <class A, class T>
VTOK_DEVICE void advance(Fragment<A>& run, const Fragment<T>& row, bool adds) {
#pragma unroll
  for (int step = 0; step < kCanonicalSteps; ++step) {
    const auto two = bit_cast<Two<T>>(row.words[step]);
    Two<A>& to = run.words[step];
    to = {adds ? add_rn(to.x, widen(two.x)) : widen(two.x), adds ? add_rn(to.y, widen(two.y)) : widen(two.y)};
  }
}

// A block takes a site; "1": to fit in one more, ptxas would spill a register or two. kPlain: rows are aligned to pairs
// of values, of even length, and taken in one part.
template <class T, class Terms, bool kPlain>
__global__ void __launch_bounds__(kGateWarps<accumulator_t<T>, kPlain>* kWarp, 1)
    temporal_gate_kernel(TemporalGateArgs<T> args, int needed_parts) {
  using A = accumulator_t<T>;
  struct Decided {
    TemporalGateSite walk;
    A sums[Terms::kSums];
  };
  VTOK_SHARED(Decided, decided);
  VTOK_DYNAMIC_SHARED(shared);
  auto* const stage = reinterpret_cast<SegmentLanes<Terms, A>*>(shared);
  const int parts = kPlain ? 1 : needed_parts;
  const int lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y;
  const int64_t site = blockIdx.x, segments = (args.D + kCanonicalSegment - 1) / kCanonicalSegment;
  if (warp == 0) find_site(args, site, decided.walk);
  __syncthreads();
  const TemporalGateSite walk = decided.walk;

  const auto column = [&](int part) {
    return (static_cast<int64_t>(part) * warps + warp) * kCanonicalSegment + 2 * lane;
  };
  const auto left = [&](int part) {  // of the thread's segment, from its own first column on
    const int64_t count = args.D - column(part);
    return static_cast<int>(count < kCanonicalSegment ? count : kCanonicalSegment);
  };
  const auto load_row = [&](int64_t t, int part, Fragment<T>& out) {
    const bool any = t < walk.frames && left(part) > 0;
    load_fragment<kPlain>(any ? args.tokens + (walk.first + t * walk.stride) * args.stride + column(part) : args.tokens,
                          any ? left(part) : 0, out);
  };
  const auto load_run = [&](const A* from, int part, Fragment<A>& out) {
    load_fragment<kPlain>(left(part) > 0 ? from + site * args.D + column(part) : from, left(part), out);
  };
  const auto store_run = [&](int part, const Fragment<A>& run) {
    if (left(part) > 0) store_fragment<kPlain>(run, left(part), args.next_rows + site * args.D + column(part));
  };

  Fragment<A> run{};
  const auto take = [&](int64_t t, int part, Fragment<T>& row) {  // nothing lies in registers for more than a part
    if (parts == 1) return;
    load_row(t, part, row);
    load_run(args.next_rows, part, run);
  };
#pragma unroll 1
  for (int part = 0; part < parts; ++part) {
    if (walk.weight > 0) load_run(args.state_rows, part, run);
    if (parts > 1) store_run(part, run);
  }
  Fragment<T> ahead[kGateAhead];
#pragma unroll
  for (int i = 0; i < kGateAhead; ++i) load_row(i, 0, ahead[i]);
  float weight = walk.weight;
  int64_t phase = walk.phase;
  for (int64_t base = 0; base < walk.frames; base += kGateAhead) {
#pragma unroll
    for (int i = 0; i < kGateAhead; ++i) {
      const int64_t t = base + i;
      if (t >= walk.frames) break;
      Fragment<T> row = ahead[i];
      if (parts == 1) load_row(t + kGateAhead, 0, ahead[i]);
      Two<A> total[Terms::kSums] = {};
#pragma unroll 1
      for (int part = 0; part < parts; ++part) {
        take(t, part, row);
        Fragment<A> reference = run;
        if (args.mean) divide(reference, static_cast<A>(weight));
        add_segment<Terms>(reference, row, stage[warp]);
        __syncthreads();
        // One warp adds up and folds a sum, and a second barrier hands it to all: were every warp to fold for itself, a
        // row of seven segments would be read from shared memory seven times.
#pragma unroll
        for (int s = 0; s < Terms::kSums; ++s) {
          if (s % warps != warp) continue;
          for (int w = 0; w < warps && static_cast<int64_t>(part) * warps + w < segments; ++w)
            add_lanes(total[s], stage[w].sums[s][lane]);
          if (part + 1 < parts) continue;
          const A sum = fold_lanes(total[s]);
          if (lane == 0) decided.sums[s] = sum;
        }
        __syncthreads();
      }
      A similarity = -static_cast<A>(INFINITY);
      if (weight > 0) {
        if constexpr (Terms::kSums == 1) similarity = -sqrt_rn(decided.sums[0]);
        else similarity = canonical_cosine(decided.sums[0], decided.sums[1], decided.sums[2], args.eps);
      }
      const bool joins = weight > 0 && similarity > args.threshold && phase != 0;
      phase = phase + 1 == args.refresh ? 0 : phase + 1;
      const int64_t s = walk.first + t * walk.stride;
      if (warp == 0 && lane == 0) args.keep[s] = !joins, args.similarity[s] = similarity;
#pragma unroll 1
      for (int part = 0; part < parts && (args.mean || args.previous || !joins); ++part) {
        take(t, part, row);
        advance(run, row, args.mean && joins);
        if (parts > 1) store_run(part, run);
      }
      weight = joins ? weight + 1 : 1;
    }
  }
  if (parts == 1) store_run(0, run);
  if (warp == 0 && lane == 0) args.next_weight[site] = weight;
}

template <class T, class Terms, bool kPlain>
cudaError_t temporal_gate_walk(const TemporalGateArgs<T>& args, int64_t segments, cudaStream_t stream) {
  using A = accumulator_t<T>;
  const int64_t parts = ceil_div(segments, kGateWarps<A, kPlain>), warps = ceil_div(segments, parts);
  return VTOK_LAUNCH((temporal_gate_kernel<T, Terms, kPlain>), dim3(args.sites), dim3(kWarp, warps),
                     warps * sizeof(SegmentLanes<Terms, A>), stream, args, static_cast<int>(parts));
}

template <class T, class Terms>
cudaError_t temporal_gate_sites(const TemporalGateArgs<T>& args, cudaStream_t stream) {
  using A = accumulator_t<T>;
  const int64_t segments = args.D > 0 ? ceil_div(args.D, kCanonicalSegment) : 1;
  const bool pairs = reinterpret_cast<uint64_t>(args.tokens) % sizeof(Two<T>) == 0 &&
                     reinterpret_cast<uint64_t>(args.state_rows) % sizeof(Two<A>) == 0 && args.stride % 2 == 0;
  return pairs && args.D % 2 == 0 && segments <= kGateWarps<A, true>
             ? temporal_gate_walk<T, Terms, true>(args, segments, stream)
             : temporal_gate_walk<T, Terms, false>(args, segments, stream);
}

// Everything defined of the outputs: keep [rows], similarity [rows], next_rows [sites, D], next_weight [sites],
// next_step [videos]. workspace: videos + 1 numbers. state_step may be null, the other two then too.
template <class T>
cudaError_t temporal_gate_launch(const T* tokens, int64_t rows, int64_t stride, int64_t D, const int64_t* cu_seqlens,
                                 const int64_t* tokens_per_frame, int64_t videos, int64_t sites, double threshold,
                                 bool previous, bool mean, bool l2, double eps, int64_t refresh,
                                 const accumulator_t<T>* state_rows, const float* state_weight,
                                 const int64_t* state_step, uint8_t* keep, accumulator_t<T>* similarity,
                                 accumulator_t<T>* next_rows, float* next_weight, int64_t* next_step,
                                 int64_t* workspace, cudaStream_t stream) {
  using A = accumulator_t<T>;
  const TemporalGateArgs<T> args{tokens,
                                 rows,
                                 stride,
                                 D,
                                 cu_seqlens,
                                 tokens_per_frame,
                                 videos,
                                 sites,
                                 static_cast<A>(threshold),
                                 static_cast<A>(eps),
                                 refresh,
                                 previous,
                                 mean,
                                 state_rows,
                                 state_weight,
                                 state_step,
                                 keep,
                                 similarity,
                                 next_rows,
                                 next_weight,
                                 next_step,
                                 workspace};
  const int64_t blocks = ceil_div(rows, 4 * kGateThreads), most = 1024;
  const dim3 grid(blocks < 1 ? 1 : blocks < most ? blocks : most);
  const cudaError_t error = VTOK_LAUNCH(temporal_gate_layout_kernel<T>, grid, dim3(kGateThreads), 0, stream, args);
  if (error != cudaSuccess || sites == 0) return error;
  return l2 ? temporal_gate_sites<T, SquaredDistance>(args, stream) : temporal_gate_sites<T, DotAndNorms>(args, stream);
}

VTOK_HOST_EXPORT("temporal_gate_float32", temporal_gate_launch<float>)
VTOK_HOST_EXPORT("temporal_gate_float16", temporal_gate_launch<f16>)
VTOK_HOST_EXPORT("temporal_gate_bfloat16", temporal_gate_launch<bf16>)
VTOK_HOST_EXPORT("temporal_gate_float64", temporal_gate_launch<double>)

}  // namespace vtok

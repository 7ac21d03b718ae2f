// Each row against the same site one frame earlier. The rows of a video are put in the order (site, frame) and cut into
// runs; a team of warps walks one run, a warp per 512 columns, keeping the row before in registers. So every row comes
// from memory once, and once more where a run begins within a site.
#pragma once

#include "common/canonical.cuh"

namespace vtok {

constexpr int kSimilarityMinRun = 8, kSimilarityMaxRun = 64;  // rows of a run
constexpr int kSimilarityAhead = 2;                           // rows on their way from memory

// Warps of a block at most; longer rows are taken in several parts.
template <class A>
constexpr int kSimilarityWarps = 64 / sizeof(A);

// Rows per barrier: their lanes are staged in shared memory, twice, so that one barrier parts writing from reading.
template <class A>
constexpr int kSimilarityStage = 16 / sizeof(A);

template <class T>
struct SimilarityArgs {
  const T* tokens;  // [rows, D], rows `stride` values apart
  int64_t rows, stride, D;
  const int64_t *cu_seqlens, *tokens_per_frame;  // [videos + 1], [videos]: any values, none leads outside a tensor
  int64_t videos, run, runs;
  accumulator_t<T> eps;
  accumulator_t<T>* scores;  // [rows]
};

// One run, in shared memory.
template <class Terms, class A>
struct alignas(16) SimilarityRun {
  int count;  // rows
  int reads;  // 0 where nothing is compared, else count
  int lead;   // 1 where the run begins within a site: the first row is another run's and only leads
  int64_t row[kSimilarityMaxRun + 1];
  bool opens[kSimilarityMaxRun + 1];  // its site: there is nothing to compare with
  A sums[Terms::kSums][kSimilarityMaxRun + 1];
};

// Where video v begins; what lies beyond the last video counts as one more, with a single frame.
template <class T>
VTOK_DEVICE int64_t video_begin(const SimilarityArgs<T>& args, int64_t v) {
  const int64_t begin = v <= args.videos ? args.cu_seqlens[v] : args.rows;
  return begin < 0 ? 0 : begin < args.rows ? begin : args.rows;
}

// The number of a video's first run: every video before it leaves room for one run that is not full.
template <class T>
VTOK_DEVICE int64_t first_run(const SimilarityArgs<T>& args, int64_t v) {
  return video_begin(args, v) / args.run + v;
}

// The last video whose first run is `run` or an earlier one: a warp searches 32 places at a time.
template <class T>
VTOK_DEVICE int64_t video_of_run(const SimilarityArgs<T>& args, int64_t run) {
  int64_t low = 0, high = args.videos + 1;
  while (high - low > 1) {
    const int64_t step = (high - low + kWarp - 1) / kWarp, probe = low + step * (threadIdx.x + 1);
    const int passed = __popc(__ballot_sync(kFullMask, probe < high && first_run(args, probe) <= run));
    low += step * passed;
    high = low + step < high ? low + step : high;
  }
  return low;
}

// Fills in the run, by one warp.
template <class T, class Run>
VTOK_DEVICE void lay_out(const SimilarityArgs<T>& args, int64_t number, Run& run) {
  const int64_t v = video_of_run(args, number), begin = video_begin(args, v), end = video_begin(args, v + 1);
  const int64_t place = (number - first_run(args, v)) * args.run, left = end - begin - place;
  const int64_t given = v < args.videos ? args.tokens_per_frame[v] : 0;
  const int64_t frame = given > 0 && given < end - begin ? given : end - begin;
  if (place < 0 || left <= 0 || number >= args.runs) {  // nothing here, or a layout that is none
    if (threadIdx.x == 0) run.count = run.reads = run.lead = 0;
    return;
  }
  const int64_t frames = (end - begin) / frame, rest = (end - begin) % frame;  // `rest` sites have one frame more
  const int64_t longer = rest * (frames + 1);
  const int lead = (place < longer ? place % (frames + 1) : (place - longer) % frames) != 0;
  const int count = static_cast<int>(left < args.run ? left : args.run) + lead;
  for (int i = threadIdx.x; i < count; i += kWarp) {
    const int64_t p = place + i - lead, q = p - longer;
    const int64_t site = q < 0 ? p / (frames + 1) : rest + q / frames, t = q < 0 ? p % (frames + 1) : q % frames;
    run.row[i] = begin + t * frame + site;
    run.opens[i] = t == 0;
  }
  if (threadIdx.x == 0) run.count = count, run.reads = frame < end - begin ? count : 0, run.lead = lead;
}

// kPlain: rows are aligned to pairs of values, of even length, and taken in one part.
template <class T, class Terms, bool kPlain>
__global__ void __launch_bounds__(kSimilarityWarps<accumulator_t<T>>* kWarp)
    similarity_kernel(SimilarityArgs<T> args, int needed_parts) {
  using A = accumulator_t<T>;
  using Run = SimilarityRun<Terms, A>;
  using Lanes = SegmentLanes<Terms, A>;
  constexpr int kStage = kSimilarityStage<A>;
  const int parts = kPlain ? 1 : needed_parts;
  const int lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y, team = threadIdx.z, teams = blockDim.z;
  const int64_t segments = (args.D + kCanonicalSegment - 1) / kCanonicalSegment;
  VTOK_DYNAMIC_SHARED(shared);
  Run& run = reinterpret_cast<Run*>(shared)[team];
  Lanes* staged = reinterpret_cast<Lanes*>(shared + teams * sizeof(Run)) + team * 2 * kStage * warps;
  if (warp == 0) lay_out(args, static_cast<int64_t>(blockIdx.x) * teams + team, run);
  __syncthreads();
  const int reads = run.reads;

  const auto load = [&](int i, int part, Fragment<T>& out) {
    const int64_t column = (static_cast<int64_t>(part) * warps + warp) * kCanonicalSegment + 2 * lane;
    const int64_t left = i >= 0 && i < reads ? args.D - column : 0;
    load_fragment<kPlain>(left > 0 ? args.tokens + run.row[i] * args.stride + column : args.tokens,
                          static_cast<int>(left < kCanonicalSegment ? left : kCanonicalSegment), out);
  };
  Fragment<T> before{}, ahead[kSimilarityAhead];
  for (int i = 0; i < kSimilarityAhead; ++i) load(i, 0, ahead[i]);
  Two<A> total[Terms::kSums];
  int base = 0, part = 0, buffer = 0;
  while (true) {
    Lanes* const stage = staged + buffer * kStage * warps;
    if (parts > 1) {  // the row before was let go for another part of this one
      load(base - 1, part, before);
      for (int i = 0; i < kSimilarityAhead; ++i) load(base + i, part, ahead[i]);
    }
    if (base < reads) {
#pragma unroll
      for (int i = 0; i < kStage; ++i) {
        const Fragment<T> now = ahead[i % kSimilarityAhead];
        if (parts == 1 || i + kSimilarityAhead < kStage)
          load(base + i + kSimilarityAhead, part, ahead[i % kSimilarityAhead]);
        add_segment<Terms>(before, now, stage[i * warps + warp]);
        before = now;
      }
    }
    if (!__syncthreads_or(base < reads)) break;
    for (int i = warp; i < kStage && base + i < reads; i += warps) {
      for (int s = 0; s < Terms::kSums; ++s) {
        if (part == 0) total[s] = Two<A>{};
        for (int w = 0; w < warps && static_cast<int64_t>(part) * warps + w < segments; ++w)
          add_lanes(total[s], stage[i * warps + w].sums[s][lane]);
        if (part + 1 < parts) continue;
        const A sum = fold_lanes(total[s]);
        if (lane == 0) run.sums[s][base + i] = sum;
      }
    }
    buffer ^= 1;
    part = part + 1 < parts ? part + 1 : 0;
    base += part == 0 ? kStage : 0;
  }

  for (int i = run.lead + warp * kWarp + lane; i < run.count; i += warps * kWarp) {
    A score = -static_cast<A>(INFINITY);
    if (!run.opens[i]) {
      if constexpr (Terms::kSums == 1) score = -sqrt_rn(run.sums[0][i]);
      else score = canonical_cosine(run.sums[0][i], run.sums[1][i - 1], run.sums[1][i], args.eps);
    }
    args.scores[run.row[i]] = score;
  }
}

template <class T, class Terms>
cudaError_t similarity_terms(const SimilarityArgs<T>& args, cudaStream_t stream) {
  using A = accumulator_t<T>;
  const int64_t segments = args.D > 0 ? ceil_div(args.D, kCanonicalSegment) : 1;
  const int64_t parts = ceil_div(segments, kSimilarityWarps<A>), warps = ceil_div(segments, parts);
  const int64_t teams = warps < 8 ? 8 / warps : 1;
  const size_t shared =
      teams * (sizeof(SimilarityRun<Terms, A>) + 2 * kSimilarityStage<A> * warps * sizeof(SegmentLanes<Terms, A>));
  const dim3 grid(ceil_div(args.runs, teams)), block(kWarp, warps, teams);
  const bool pairs = reinterpret_cast<uint64_t>(args.tokens) % sizeof(Two<T>) == 0 && args.stride % 2 == 0;
  const int needed = static_cast<int>(parts);
  return pairs && args.D % 2 == 0 && parts == 1
             ? VTOK_LAUNCH((similarity_kernel<T, Terms, true>), grid, block, shared, stream, args, needed)
             : VTOK_LAUNCH((similarity_kernel<T, Terms, false>), grid, block, shared, stream, args, needed);
}

// rows > 0. The grid follows from `rows` alone: the host knows no layout.
template <class T>
cudaError_t similarity_launch(const T* tokens, int64_t rows, int64_t stride, int64_t D, const int64_t* cu_seqlens,
                              const int64_t* tokens_per_frame, int64_t videos, bool l2, double eps,
                              accumulator_t<T>* scores, cudaStream_t stream) {
  int64_t run = rows / 2048;  // some thousand runs, and rarely a row that is read twice
  run = run < kSimilarityMinRun ? kSimilarityMinRun : run < kSimilarityMaxRun ? run : kSimilarityMaxRun;
  const SimilarityArgs<T> args{tokens,
                               rows,
                               stride,
                               D,
                               cu_seqlens,
                               tokens_per_frame,
                               videos,
                               run,
                               rows / run + videos + 1,
                               static_cast<accumulator_t<T>>(eps),
                               scores};
  return l2 ? similarity_terms<T, SquaredDistance>(args, stream) : similarity_terms<T, DotAndNorm>(args, stream);
}

VTOK_HOST_EXPORT("temporal_similarity_float32", similarity_launch<float>)
VTOK_HOST_EXPORT("temporal_similarity_float16", similarity_launch<f16>)
VTOK_HOST_EXPORT("temporal_similarity_bfloat16", similarity_launch<bf16>)
VTOK_HOST_EXPORT("temporal_similarity_float64", similarity_launch<double>)

}  // namespace vtok

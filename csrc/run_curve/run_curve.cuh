// A block takes a site: it multiplies tiles of its rows minus the first one, some columns at a time in shared memory;
// sums the products over runs; and goes through the numbers of runs, a thread to a last frame. The costs of all runs, a
// triangle, lie in shared memory, or in a workspace of the block's own where they do not fit.
#pragma once

#include "common/kernel.h"
#include "run_curve/run_curve.h"

namespace vtok {

constexpr int kCurveSide = 16, kCurveThreads = kCurveSide * kCurveSide;   // threads along a side of a tile
constexpr int kCurveDepth = 32, kCurvePitch = kCurveDepth + 4;            // columns of a tile; 16-byte reads of 8 rows
                                                                          // meet no bank twice
constexpr int64_t kCurveBlocks = 2048;                                    // blocks where the costs are on the chip
constexpr int64_t kCurveRooms = 132, kCurveRoomBytes = int64_t{1} << 30;  // else as many as there are rooms, at most

template <class T>
struct CurveArgs {
  const T* tokens;  // [rows, D], rows `stride` values apart
  int64_t rows, stride, D;
  const int64_t *cu_seqlens, *tokens_per_frame;  // [videos + 1], [videos]: any values, none leads outside a tensor
  int64_t videos, frames, words;                 // frames: of the longest video; words: of a mask
  const float* weights;                          // [rows], or null
  int64_t extra_rows;
  float *curve, *gain;     // [rows]
  int64_t* opens;          // [rows, words]
  char* rooms;             // one of `room` bytes for each block, or null: shared memory
  int64_t room, triangle;  // triangle: where in a room the costs begin
};

// What a site needs once the tiles' time is over, and the triangle, which they fill.
struct CurveRoom {
  double *squares, *weight;   // [frames + 1], of the frames before
  unsigned long long* masks;  // [2, frames, words], of an even and of an odd number of runs
  float* least;               // [2, pitch]
  int64_t pitch;
  float *points, *triangle;
  int32_t* corners;
};

inline int64_t curve_table_bytes(int64_t frames, int64_t words) {
  return 16 * (frames + 1) + 16 * frames * words + 16 * ((frames + 3) / 4 * 4);
}

VTOK_DEVICE CurveRoom curve_room(char* at, int64_t triangle, int64_t frames, int64_t words) {
  CurveRoom room;
  room.pitch = (frames + 3) / 4 * 4;
  room.squares = reinterpret_cast<double*>(at);
  room.weight = room.squares + frames + 1;
  room.masks = reinterpret_cast<unsigned long long*>(room.weight + frames + 1);
  room.least = reinterpret_cast<float*>(room.masks + 2 * frames * words);
  room.points = room.least + 2 * room.pitch;
  room.corners = reinterpret_cast<int32_t*>(room.points + room.pitch);
  room.triangle = reinterpret_cast<float*>(at + triangle);
  return room;
}

// The first row of a site, and what follows from the layout.
struct CurveSite {
  int64_t row, step, frames, entry;
};

// Where row i of the triangle would begin, had it the places before the diagonal too.
VTOK_DEVICE float* curve_row(float* triangle, int64_t frames, int64_t i) {
  return triangle + i * frames - i * (i + 1) / 2;
}

struct alignas(16) CurveFour {
  float x[4];
};

template <class T>
VTOK_DEVICE float curve_difference(T a, T b) {
  return widen(a) - widen(b);
}
VTOK_DEVICE float curve_difference(double a, double b) { return static_cast<float>(a - b); }

// The products of frames [first, first + tile) with [other, other + tile), into the triangle.
template <class T, int kEach>
VTOK_DEVICE void multiply_frames(const CurveArgs<T>& args, const CurveSite& site, int64_t first, int64_t other,
                                 float* tiles, float* triangle) {
  constexpr int kTile = kCurveSide * kEach, kRows = kCurveThreads / kCurveDepth, kLoads = 2 * kTile / kRows;
  const int thread = threadIdx.x, x = thread % kCurveSide, y = thread / kCurveSide;
  const int column = thread % kCurveDepth, row = thread / kCurveDepth;
  float dots[kEach][kEach] = {}, cargo[kLoads];
  auto* const rows = reinterpret_cast<int64_t*>(tiles + 2 * kTile * kCurvePitch);  // where they lie, -1 beyond the last
  if (thread < 2 * kTile) {
    const int64_t t = thread < kTile ? first + thread : other + thread - kTile;
    rows[thread] = t < site.frames ? (site.row + t * site.step) * args.stride : -1;
  }
  __syncthreads();
  const auto fetch = [&](int64_t start) {
    const int64_t at = start + column;
    const T zero = at < args.D ? args.tokens[site.row * args.stride + at] : T{};
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64_t begin = rows[row + i * kRows];
      cargo[i] = begin >= 0 && at < args.D ? curve_difference(args.tokens[begin + at], zero) : 0.0f;
    }
  };
  fetch(0);
  for (int64_t start = 0; start < args.D; start += kCurveDepth) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) tiles[(row + i * kRows) * kCurvePitch + column] = cargo[i];
    __syncthreads();
    fetch(start + kCurveDepth);
#pragma unroll 2
    for (int k = 0; k < kCurveDepth; k += 4) {
      CurveFour a[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i)
        a[i] = *reinterpret_cast<const CurveFour*>(tiles + (y + i * kCurveSide) * kCurvePitch + k);
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const auto b = *reinterpret_cast<const CurveFour*>(tiles + (kTile + x + j * kCurveSide) * kCurvePitch + k);
#pragma unroll
        for (int i = 0; i < kEach; ++i)
#pragma unroll
          for (int c = 0; c < 4; ++c) dots[i][j] = fmaf(a[i].x[c], b.x[c], dots[i][j]);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i)
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int64_t a = first + y + i * kCurveSide, b = other + x + j * kCurveSide;
      if (a <= b && b < site.frames) curve_row(triangle, site.frames, a)[b] = dots[i][j];
    }
}

template <class T>
VTOK_DEVICE double curve_weight(const CurveArgs<T>& args, const CurveSite& site, int64_t t) {
  return args.weights ? args.weights[site.row + t * site.step] : 1.0;
}

// Products become what frames i to j cost as one run: a thread sums up a row, then a column. Whether all is finite.
template <class T>
VTOK_DEVICE bool fill_costs(const CurveArgs<T>& args, const CurveSite& site, const CurveRoom& room) {
  const int64_t frames = site.frames;
  if (threadIdx.x == 0) {
    room.squares[0] = room.weight[0] = 0;
    for (int64_t t = 0; t < frames; ++t) {
      const double weight = curve_weight(args, site, t);
      room.squares[t + 1] = room.squares[t] + curve_row(room.triangle, frames, t)[t] * weight;
      room.weight[t + 1] = room.weight[t] + weight;
    }
  }
  __syncthreads();
  const auto most = static_cast<float>(4 * room.weight[frames] * room.squares[frames]);
  const bool finite = most - most == 0;
  float* const own = room.least + room.pitch;
  for (int64_t i = threadIdx.x; i < frames; i += kCurveThreads) {
    float* const row = curve_row(room.triangle, frames, i);
    const double weight = curve_weight(args, site, i);
    double sum = 0;
    for (int64_t j = i; j < frames; ++j) {
      sum += row[j] * weight * curve_weight(args, site, j);
      row[j] = static_cast<float>(sum);
      if (j == i) own[i] = row[j];
    }
  }
  __syncthreads();
  for (int64_t j = threadIdx.x; j < frames; j += kCurveThreads) {
    double rest = 0;  // |Σ w·y|² of the run
    for (int64_t i = j; i >= 0; --i) {
      float& cost = curve_row(room.triangle, frames, i)[j];
      rest += 2 * static_cast<double>(cost) - own[i];
      const double weight = room.weight[j + 1] - room.weight[i];
      const double left = (room.squares[j + 1] - room.squares[i]) - rest / weight;
      cost = finite && i < j && weight > 0 && left > 0 ? static_cast<float>(left) : 0.0f;
    }
  }
  __syncthreads();
  return finite;
}

// The best k + 1 runs up to each last frame from the best k.
VTOK_DEVICE void open_run(const CurveRoom& room, int64_t frames, int64_t words, int64_t k) {
  const float* const before = room.least + (k + 1) % 2 * room.pitch;
  float* const least = room.least + k % 2 * room.pitch;
  const unsigned long long* const old = room.masks + (k + 1) % 2 * frames * words;
  unsigned long long* const masks = room.masks + k % 2 * frames * words;
  for (int64_t j = k + threadIdx.x; j < frames; j += kCurveThreads) {
    const float* cost = curve_row(room.triangle, frames, k) + j;
    float best = INFINITY;
    int64_t at = k;
#pragma unroll 4
    for (int64_t i = k; i <= j; ++i) {
      const float sum = before[i - 1] + *cost;
      if (sum < best) best = sum, at = i;
      cost += frames - 1 - i;
    }
    least[j] = best;
    for (int64_t w = 0; w < words; ++w)
      masks[j * words + w] = old[(at - 1) * words + w] | (at / kCurveWord == w ? 1ull << at % kCurveWord : 0ull);
  }
}

template <class T, int kEach>
VTOK_DEVICE void run_site(const CurveArgs<T>& args, const CurveSite& site, float* tiles, const CurveRoom& room) {
  const int64_t frames = site.frames, words = args.words;
  constexpr int kTile = kCurveSide * kEach;
  for (int64_t first = 0; first < frames; first += kTile)
    for (int64_t other = first; other < frames; other += kTile)
      multiply_frames<T, kEach>(args, site, first, other, tiles, room.triangle);
  __syncthreads();
  const bool finite = fill_costs(args, site, room);
  for (int64_t j = threadIdx.x; j < frames; j += kCurveThreads) {
    room.least[j] = room.triangle[j];
    for (int64_t w = 0; w < words; ++w) room.masks[j * words + w] = w == 0;
  }
  __syncthreads();
  for (int64_t k = 0; k < frames; ++k) {
    if (k > 0) open_run(room, frames, words, k);
    __syncthreads();
    for (int64_t w = threadIdx.x; w < words; w += kCurveThreads)
      args.opens[(site.entry + k) * words + w] =
          static_cast<int64_t>(room.masks[(k % 2 * frames + frames - 1) * words + w]);
    if (threadIdx.x == 0) room.points[k] = room.least[k % 2 * room.pitch + frames - 1];
  }
  if (threadIdx.x == 0)
    write_hull(room.points, frames, finite, room.corners, args.curve + site.entry, args.gain + site.entry);
  __syncthreads();
}

// Rows that are sites of their own.
template <class T>
VTOK_DEVICE void write_alone(const CurveArgs<T>& args, int64_t begin, int64_t end, int64_t block, int64_t blocks) {
  for (int64_t row = begin + block * kCurveThreads + threadIdx.x; row < end; row += blocks * kCurveThreads) {
    args.curve[row] = 0;
    args.gain[row] = INFINITY;
    for (int64_t w = 0; w < args.words; ++w) args.opens[row * args.words + w] = w == 0;
  }
}

// "1": to fit in one block more, ptxas would spill a few registers.
template <class T, int kEach>
__global__ void __launch_bounds__(kCurveThreads, 1) run_curve_kernel(CurveArgs<T> args) {
  VTOK_DYNAMIC_SHARED(shared);
  const int64_t block = static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y;
  char* const place = args.rooms ? args.rooms + block * args.room : shared;
  const auto bound = [&](int64_t v) {
    const int64_t begin = args.cu_seqlens[v];
    return begin < 0 ? 0 : begin < args.rows ? begin : args.rows;
  };
  for (int64_t v = blockIdx.x; v < args.videos; v += gridDim.x) {
    const int64_t begin = bound(v), end = bound(v + 1);
    const CurveVideo video =
        curve_video(begin, end < begin ? begin : end, args.tokens_per_frame[v], args.extra_rows, args.frames);
    write_alone(args, begin + video.sites * video.frames, end, blockIdx.y, gridDim.y);
    const CurveRoom room = curve_room(place, args.triangle, video.frames, args.words);
    for (int64_t s = blockIdx.y; s < video.sites; s += gridDim.y)
      run_site<T, kEach>(args, {begin + s, video.sites, video.frames, begin + s * video.frames},
                         reinterpret_cast<float*>(shared), room);
  }
  write_alone(args, bound(args.videos), args.rows, block, static_cast<int64_t>(gridDim.x) * gridDim.y);
}

struct CurveGrid {
  int64_t x, y, shared;                 // blocks; shared memory of each
  int64_t room, triangle, room_blocks;  // bytes of a room, the triangle's place in it, and rooms in the workspace
};

// Videos along x, their sites along y: the host knows no layout. `limit` is the shared memory that a block may have.
inline CurveGrid curve_grid(int64_t rows, int64_t videos, int64_t frames, int64_t limit) {
  const int64_t longest = frames < rows ? frames : rows, table = curve_table_bytes(longest, curve_words(frames));
  const int64_t tiles = 2 * kCurveSide * (longest > 32 ? 4 : 2) * (kCurvePitch * 4 + 8);
  const int64_t costs = (longest * (longest + 1) / 2 * 4 + 15) / 16 * 16;
  CurveGrid grid;
  grid.triangle = table < tiles ? tiles : table;  // the tables take the tiles' place
  grid.room = grid.shared = grid.triangle + costs;
  int64_t blocks = kCurveBlocks;
  if (grid.shared > limit) {
    blocks = kCurveRoomBytes / grid.room < kCurveRooms ? kCurveRoomBytes / grid.room + 1 : kCurveRooms;
    grid.shared = tiles;
  }
  grid.x = videos < 1 ? 1 : videos < blocks ? videos : blocks;
  grid.y = blocks / grid.x < rows ? blocks / grid.x : rows;
  grid.room_blocks = grid.shared == tiles ? grid.x * grid.y : 0;
  return grid;
}

// rows > 0; workspace: the rooms that curve_grid asks for, 16-byte aligned.
template <class T>
cudaError_t run_curve_launch(const T* tokens, int64_t rows, int64_t stride, int64_t D, const int64_t* cu_seqlens,
                             const int64_t* tokens_per_frame, int64_t videos, int64_t frames, const float* weights,
                             int64_t extra_rows, float* curve, float* gain, int64_t* opens, char* workspace,
                             int64_t limit, cudaStream_t stream) {
  const CurveGrid grid = curve_grid(rows, videos, frames, limit);
  const int64_t longest = frames < rows ? frames : rows;
  const CurveArgs<T> args{tokens,    rows,         stride,
                          D,         cu_seqlens,   tokens_per_frame,
                          videos,    longest,      curve_words(frames),
                          weights,   extra_rows,   curve,
                          gain,      opens,        grid.room_blocks ? workspace : nullptr,
                          grid.room, grid.triangle};
  const dim3 blocks(grid.x, grid.y);
  return longest > 32 ? VTOK_LAUNCH((run_curve_kernel<T, 4>), blocks, dim3(kCurveThreads), grid.shared, stream, args)
                      : VTOK_LAUNCH((run_curve_kernel<T, 2>), blocks, dim3(kCurveThreads), grid.shared, stream, args);
}

VTOK_HOST_EXPORT("run_curve_float32", run_curve_launch<float>)
VTOK_HOST_EXPORT("run_curve_float16", run_curve_launch<f16>)
VTOK_HOST_EXPORT("run_curve_bfloat16", run_curve_launch<bf16>)
VTOK_HOST_EXPORT("run_curve_float64", run_curve_launch<double>)

}  // namespace vtok

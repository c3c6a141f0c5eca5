// Block-scaled fp8 products whose time is that of reading the weight: few tokens, or experts.
//
// The weight is the first operand of the tensor core, 64 rows an instruction, the tokens the second, as many as there
// are, rounded up to 16. One warp copies slices of 128 along K of both into a ring of stages; warpgroups multiply a
// slice from zero and fold the raw sums into their accumulators, `acc = fma(raw, x_scale * weight_scale, acc)`, K
// ascending. While one part's raw sums are folded the tensor core works on the next. Programs take tile after tile.
//
// Compile-time parameters: a program has ROW_GROUPS warpgroups of ROW_BLOCKS x 64 rows of the weight, of which a tile
// keeps TILE_ROWS (so that there are as many tiles as multiprocessors); at most TOKENS tokens a tile, copied TOKEN_BOX
// at a time; STAGES of SLICES slices; raw sums of TOKEN_PARTS parts of the tokens, of which BUFFERS are held; at most
// GROUPS experts; CONSUMER_REGISTERS a thread (0: as the compiler likes).

#include "hopper.cuh"
#include "wgmma.cuh"

constexpr int ROWS = 64 * ROW_BLOCKS * ROW_GROUPS;
constexpr int SLICE_BYTES = TILE_ROWS * 128;
constexpr int WEIGHT_BYTES = SLICES * SLICE_BYTES;
constexpr int TOKEN_SLICE_BYTES = (TOKENS + TOKEN_BOX - 1) / TOKEN_BOX * TOKEN_BOX * 128;
constexpr int TOKEN_BYTES = SLICES * TOKEN_SLICE_BYTES;
static_assert(SLICES == 1 || TOKENS == TOKEN_BOX, "a copy of several slices holds all tokens");

// Copies begin at a multiple of 16 bytes; an expert's first token may lie up to three scales behind.
constexpr int SCALE_BOX = TOKENS + (GROUPS > 1 ? 4 : 0);
constexpr int SCALE_BYTES = (SLICES * SCALE_BOX * 4 + 127) / 128 * 128;

// Rows of one thread, 8 apart, may lie in two scale blocks if tiles do not fit into them.
constexpr bool SPLIT = 128 % TILE_ROWS != 0 && TILE_ROWS % 128 != 0;
constexpr int PRODUCERS = CONSUMER_REGISTERS ? 128 : 32;

// A token's 64 sums in bf16, and 16 bytes so that eight tokens fall into different banks.
constexpr int OUT_PITCH = 144;
constexpr int OUT_BYTES = TOKENS * OUT_PITCH;

// Shared memory, as addresses of the tensor core and the copy engine, and as pointers.
struct Shared {
    u32 weight, tokens, scales, out, full, empty;
    const float* scale_values;
    const char* out_values;
};

struct Operands {
    const float* weight_scale;
    unsigned short* out;
    int columns, blocks;
};

struct Tile {
    int first_token;
    int token_count;
    int first_row;   // of the expert's weight
    int weight_row;  // of all experts' weights
    int scale_row;   // of all experts' scales, where this expert's begin
};

// Tiles of all experts, one after the other: for each part of the weight its chunks of tokens.
struct Schedule {
    const int* first_row;   // [groups + 1], tokens before an expert
    const int* first_tile;  // [groups + 1], tiles before an expert
    int groups, columns, group;

    __device__ __forceinline__ bool find(int number, Tile& tile) {
        while (group < groups && number >= first_tile[group + 1]) group++;
        if (group == groups) return false;
        const int rows = first_row[group + 1] - first_row[group];
        const int chunks = (rows + TOKENS - 1) / TOKENS;
        const int size = ((rows + chunks - 1) / chunks + 15) / 16 * 16;
        const int local = number - first_tile[group];
        const int chunk = local % chunks * size;
        tile.first_token = first_row[group] + chunk;
        tile.token_count = min(size, rows - chunk);
        tile.first_row = local / chunks * TILE_ROWS;
        tile.weight_row = group * columns + tile.first_row;
        tile.scale_row = group * ((columns + 127) / 128);
        return true;
    }
};

// Where the ring stands, for the warp that fills it and for those who empty it.
struct Place {
    int stage = 0;
    u32 phase = 0;
    __device__ __forceinline__ void next() {
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
};

// Where the scales of a thread's two rows of the weight are; rows that are not stored get any.
struct WeightScales {
    const float* first;
    const float* second;
    __device__ __forceinline__ WeightScales(const Operands& operands, const Tile& tile, int rows_before) {
        const int row = tile.first_row + rows_before + (SPLIT ? threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 : 0);
        const int last = (operands.columns - 1) / 128;
        const long long blocks = operands.blocks;
        first = operands.weight_scale + (tile.scale_row + min(row / 128, last)) * blocks;
        second = operands.weight_scale + (tile.scale_row + min((row + 8) / 128, last)) * blocks;
    }
    __device__ __forceinline__ float2 load(int block) const {
        const float scale = __ldg(first + block);
        return make_float2(scale, SPLIT ? __ldg(second + block) : scale);
    }
};

// Fold a slice's raw sums of this thread: tokens 8 j + 2 (lane % 4) and the next, two rows of the weight each.
template <int COUNT>
__device__ __forceinline__ void fold(float* acc, const float (&raw)[COUNT], const float* token_scales, float2 weight) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < COUNT / 4; j++) {
        const float* place = token_scales + 8 * j + 2 * (lane % 4);
        const float2 token = GROUPS > 1 ? make_float2(place[0], place[1]) : *reinterpret_cast<const float2*>(place);
        const float even = __fmul_rn(token.x, weight.x), odd = __fmul_rn(token.y, weight.x);
        const float even8 = SPLIT ? __fmul_rn(token.x, weight.y) : even;
        const float odd8 = SPLIT ? __fmul_rn(token.y, weight.y) : odd;
        acc[4 * j] = __fmaf_rn(raw[4 * j], even, acc[4 * j]);
        acc[4 * j + 1] = __fmaf_rn(raw[4 * j + 1], odd, acc[4 * j + 1]);
        acc[4 * j + 2] = __fmaf_rn(raw[4 * j + 2], even8, acc[4 * j + 2]);
        acc[4 * j + 3] = __fmaf_rn(raw[4 * j + 3], odd8, acc[4 * j + 3]);
    }
}

// 64 rows of the weight times 2 COUNT tokens over 128 of K, from zero.
template <int COUNT>
__device__ __forceinline__ void multiply(float (&raw)[COUNT], u32 weight, u32 tokens) {
    const u64 a = tile_descriptor(weight), b = tile_descriptor(tokens);
    wgmma_begin();
#pragma unroll
    for (int k = 0; k < 4; k++) wgmma(raw, a + 2 * k, b + 2 * k, k != 0);
    wgmma_end();
}

// Round and write 64 rows of the weight x N tokens through shared memory, 128 bytes a token.
template <int N>
__device__ __forceinline__ void store(
    const float (&acc)[N / 2], const Shared& shared, const Operands& operands, const Tile& tile, int rows_before) {
    const int lane = threadIdx.x % 32, thread = threadIdx.x % 128, group = threadIdx.x / 128;
    const u32 buffer = shared.out + group * OUT_BYTES;
    warpgroup_sync(group);
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
        // Lanes 0 to 7 address the tokens of rows 0 to 7 of this warp, lanes 8 to 15 those of rows 8 to 15.
        const u32 target = buffer + (8 * j + lane % 8) * OUT_PITCH + thread / 32 * 32 + lane % 16 / 8 * 16;
        store_transposed(target, pack_bf16(acc[4 * j], acc[4 * j + 1]), pack_bf16(acc[4 * j + 2], acc[4 * j + 3]));
    }
    warpgroup_sync(group);
    const int row = rows_before + thread % 8 * 8;
    if (row < TILE_ROWS && tile.first_row + row < operands.columns) {
        const char* source = shared.out_values + group * OUT_BYTES + thread % 8 * 16;
        for (int token = thread / 8; token < tile.token_count; token += 16) {
            const long long place = (long long)(tile.first_token + token) * operands.columns + tile.first_row + row;
            *reinterpret_cast<uint4*>(operands.out + place) =
                *reinterpret_cast<const uint4*>(source + token * OUT_PITCH);
        }
    }
}

// Multiply a tile of N tokens.
template <int N>
__device__ __forceinline__ void multiply_tile(
    const Tile& tile, const Shared& shared, const Operands& operands, Place& place) {
    constexpr int COUNT = N / TOKEN_PARTS / 2, PARTS = SLICES * ROW_BLOCKS * TOKEN_PARTS;
    constexpr int HELD = BUFFERS < PARTS ? BUFFERS : PARTS;
    const int row_group = threadIdx.x / 128;
    const auto rows_before = [&](int r) { return (row_group * ROW_BLOCKS + r) * 64; };
    const float* token_scales = shared.scale_values + tile.first_token % 4;
    float acc[ROW_BLOCKS][N / 2] = {}, raw[HELD][COUNT];
    float2 next[SLICES][ROW_BLOCKS];
    const auto read_scales = [&](int block) {
#pragma unroll
        for (int r = 0; r < ROW_BLOCKS; r++) {
            const WeightScales scales(operands, tile, rows_before(r));
#pragma unroll
            for (int s = 0; s < SLICES; s++) next[s][r] = scales.load(min(block + s, operands.blocks - 1));
        }
    };
    read_scales(0);
    for (int block = 0; block < operands.blocks; block += SLICES) {
        float2 weight[SLICES][ROW_BLOCKS];
#pragma unroll
        for (int s = 0; s < SLICES; s++) {
#pragma unroll
            for (int r = 0; r < ROW_BLOCKS; r++) weight[s][r] = next[s][r];
        }
        // Parts of a stage in order: slices, their blocks of rows, their parts of the tokens.
        const auto start = [&](int part) {
            const int t = part % TOKEN_PARTS, r = part / TOKEN_PARTS % ROW_BLOCKS, s = part / TOKEN_PARTS / ROW_BLOCKS;
            multiply<COUNT>(
                raw[part % HELD],
                shared.weight + place.stage * WEIGHT_BYTES + s * SLICE_BYTES + rows_before(r) * 128,
                shared.tokens + place.stage * TOKEN_BYTES + s * TOKEN_SLICE_BYTES + t * COUNT * 256);
        };
        const auto finish = [&](int part) {
            const int t = part % TOKEN_PARTS, r = part / TOKEN_PARTS % ROW_BLOCKS, s = part / TOKEN_PARTS / ROW_BLOCKS;
            hold(raw[part % HELD]);
            // Slices behind the last are zeros; folding them could turn -0 into +0.
            if (SLICES > 1 && block + s >= operands.blocks) return;
            fold<COUNT>(
                acc[r] + t * COUNT, raw[part % HELD],
                token_scales + place.stage * (SCALE_BYTES / 4) + s * SCALE_BOX + 2 * t * COUNT, weight[s][r]);
        };
        barrier_wait(shared.full + 8 * place.stage, place.phase);
#pragma unroll
        for (int part = 0; part < HELD - 1; part++) start(part);
        read_scales(block + SLICES);
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            if (part + HELD - 1 < PARTS) start(part + HELD - 1);
            wgmma_wait(min(HELD - 1, PARTS - 1 - part));
            finish(part);
        }
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(shared.empty + 8 * place.stage);
        place.next();
    }
#pragma unroll
    for (int r = 0; r < ROW_BLOCKS; r++) store<N>(acc[r], shared, operands, tile, rows_before(r));
}

// The instruction's width is a compile-time number: find the one that holds the tile's tokens.
template <int N>
__device__ __forceinline__ void multiply_tile_from(
    const Tile& tile, const Shared& shared, const Operands& operands, Place& place) {
    if constexpr (N < TOKENS) {
        if (tile.token_count > N) {
            multiply_tile_from<N + 16>(tile, shared, operands, place);
            return;
        }
    }
    multiply_tile<N>(tile, shared, operands, place);
}

// Tokens and tiles before each expert, summed by one warp, 32 experts at a time.
__device__ __forceinline__ void count_tiles(
    const long long* counts, int rows, int groups, int column_tiles, int* first_row, int* first_tile) {
    const int lane = threadIdx.x % 32;
    int rows_before = 0, tiles_before = 0;
    for (int start = 0; start < groups; start += 32) {
        const int index = start + lane;
        int tokens = 0;
        if (index < groups) tokens = counts ? int(counts[index]) : rows;
        int tiles = (tokens + TOKENS - 1) / TOKENS * column_tiles;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int lower_tokens = __shfl_up_sync(~0u, tokens, step), lower_tiles = __shfl_up_sync(~0u, tiles, step);
            if (lane >= step) tokens += lower_tokens, tiles += lower_tiles;
        }
        if (index < groups) first_row[index + 1] = rows_before + tokens, first_tile[index + 1] = tiles_before + tiles;
        rows_before += __shfl_sync(~0u, tokens, 31);
        tiles_before += __shfl_sync(~0u, tiles, 31);
    }
    if (lane == 0) first_row[0] = first_tile[0] = 0;
}

// x e4m3 [rows, K], its scales fp32 [K / 128, rows], weight e4m3 [groups columns, K], its scales fp32
// [groups, ceil(columns / 128), K / 128], counts [groups] tokens of each expert (none: all tokens are one's), to out
// bf16 [rows, columns]; K = 128 blocks. Maps of x and weight have dimensions (128, rows, K / 128).
extern "C" __global__ void __launch_bounds__(128 * ROW_GROUPS + PRODUCERS, 1) fp8_stream(
    const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap x_scale,
    const __grid_constant__ TensorMap weight, const float* weight_scale, const long long* counts, unsigned short* out,
    int rows, int columns, int blocks, int groups) {
    extern __shared__ __align__(1024) char memory[];
    // The last stage's instructions read ROWS rows.
    char* token_values = memory + STAGES * WEIGHT_BYTES + (ROWS - TILE_ROWS) * 128;
    char* scale_values = token_values + STAGES * TOKEN_BYTES;
    char* out_values = scale_values + STAGES * SCALE_BYTES;
    u64* barriers = reinterpret_cast<u64*>(out_values + ROW_GROUPS * OUT_BYTES);
    int* first_row = reinterpret_cast<int*>(barriers + 2 * STAGES);
    int* first_tile = first_row + GROUPS + 1;
    const u32 full = shared_address(barriers), empty = full + 8 * STAGES;
    const Shared shared{shared_address(memory), shared_address(token_values), shared_address(scale_values),
                        shared_address(out_values), full, empty, reinterpret_cast<const float*>(scale_values),
                        out_values};

    const int warp = threadIdx.x / 32;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, 4 * ROW_GROUPS);
        barrier_init_fence();
    }
    if (warp == 1) count_tiles(counts, rows, groups, (columns + TILE_ROWS - 1) / TILE_ROWS, first_row, first_tile);
    __syncthreads();

    Schedule schedule{first_row, first_tile, groups, columns, 0};
    Tile tile;
    Place place;
    if (warp < 4 * ROW_GROUPS) {
#if CONSUMER_REGISTERS
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
#endif
        const Operands operands{weight_scale, out, columns, blocks};
        for (int number = blockIdx.x; schedule.find(number, tile); number += gridDim.x) {
            multiply_tile_from<16>(tile, shared, operands, place);
        }
        return;
    }
#if CONSUMER_REGISTERS
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
#endif
    if (warp > 4 * ROW_GROUPS || threadIdx.x % 32 > 0) return;
    place.phase = 1;
    for (int number = blockIdx.x; schedule.find(number, tile); number += gridDim.x) {
        const int boxes = (tile.token_count + TOKEN_BOX - 1) / TOKEN_BOX;
        for (int block = 0; block < blocks; block += SLICES) {
            const u32 ready = full + 8 * place.stage;
            barrier_wait(empty + 8 * place.stage, place.phase);
            barrier_expect(ready, WEIGHT_BYTES + SLICES * (boxes * TOKEN_BOX * 128 + SCALE_BOX * 4));
            copy_slices(shared.weight + place.stage * WEIGHT_BYTES, &weight, ready, tile.weight_row, block);
            for (int box = 0; box < boxes; box++) {
                const u32 target = shared.tokens + place.stage * TOKEN_BYTES + box * TOKEN_BOX * 128;
                copy_slices(target, &x, ready, tile.first_token + box * TOKEN_BOX, block);
            }
            copy_tile(shared.scales + place.stage * SCALE_BYTES, &x_scale, ready, tile.first_token / 4 * 4, block);
            place.next();
        }
    }
}

// Block-scaled fp8 products, dense and by expert; made for those whose time is that of reading the weight.
//
// With few tokens the weight is the first operand of the tensor core, 64 rows an instruction, and the tokens are the
// second, as many as there are, rounded up to 16. From 64 tokens on it may be the other way round (TOKENS_FIRST), which
// takes fewer products of scales. One warp copies slices of 128 along K of both into a ring of stages; warpgroups
// multiply a slice from zero and fold the raw sums into their accumulators, `acc = fma(raw, x_scale * weight_scale,
// acc)`, K ascending. While one part's raw sums are folded the tensor core works on the next. Where one warpgroup's
// chain of copies, products and folds would be the time, several make the raw sums of different stages at once, and
// fold them in order. Programs take tile after tile.
//
// Compile-time parameters: the first operand has 64 rows for each of ROW_BLOCKS parts of ROW_GROUPS warpgroups, or of
// K_GROUPS warpgroups that take stages in turn; a tile has TILE_ROWS rows of the weight (so that there are as many
// tiles as multiprocessors; instructions read past them) and at most TOKENS tokens, copied TOKEN_BOX at a time; STAGES
// of SLICES slices; raw sums of TOKEN_PARTS parts of the second operand, of which BUFFERS are held; CLUSTER programs
// read the tokens of neighbouring tiles once, or with SHARE_WEIGHT the weight of neighbouring chunks of tokens, and
// pass them to each other; at most GROUPS experts; CONSUMER_REGISTERS a thread (0: as the compiler likes). The copy
// engine writes the sums while the next tile is multiplied if there is memory for them: OUT_BOXES boxes a warp, or with
// IN_RING the tile's last stage.

#include "hopper.cuh"
#include "wgmma.cuh"

// Rows of the first operand, and of the second at most.
constexpr int ROWS = 64 * ROW_BLOCKS * ROW_GROUPS;
constexpr int WIDTH = TOKENS_FIRST ? TILE_ROWS : TOKENS;
static_assert(!TOKENS_FIRST || (TOKENS == ROWS && ROW_BLOCKS == 1), "tokens fill the first operand, 64 a warpgroup");
constexpr int CONSUMERS = ROW_GROUPS * K_GROUPS;
static_assert(K_GROUPS == 1 || ROW_BLOCKS * ROW_GROUPS * TOKEN_PARTS == 1, "turns are taken on tiles of 64 rows");
// A warpgroup that waits for a stage has seen the stage's last use: it was its own, or one that it folded behind.
static_assert(STAGES >= K_GROUPS, "a turn each for the stages");
constexpr bool SHARE_TOKENS = CLUSTER > 1 && !SHARE_WEIGHT;
static_assert(
    !SHARE_TOKENS || (SLICES > 1 ? SLICES % CLUSTER == 0 : TOKENS == CLUSTER * TOKEN_BOX),
    "each program of a cluster copies as many of a stage's tokens");
static_assert(
    !SHARE_WEIGHT || (SLICES > 1 ? SLICES % CLUSTER == 0 : TILE_ROWS % (8 * CLUSTER) == 0), "or of the weight's rows");
static_assert(SLICES == 1 || TOKENS == TOKEN_BOX, "a copy of several slices holds all tokens");
constexpr int SLICE_BYTES = TILE_ROWS * 128;
constexpr int WEIGHT_BYTES = SLICES * SLICE_BYTES;
constexpr int TOKEN_SLICE_BYTES = (TOKENS + TOKEN_BOX - 1) / TOKEN_BOX * TOKEN_BOX * 128;
constexpr int TOKEN_BYTES = SLICES * TOKEN_SLICE_BYTES;

// Copies begin at a multiple of 16 bytes; an expert's first token may lie up to three scales behind.
constexpr int SCALE_BOX = TOKENS + (GROUPS > 1 ? 4 : 0);
constexpr int SCALE_BYTES = (SLICES * SCALE_BOX * 4 + 127) / 128 * 128;

// Rows of the weight that a thread has may lie in two scale blocks if tiles do not fit into them.
constexpr bool SPLIT = 128 % TILE_ROWS != 0 && (TOKENS_FIRST || TILE_ROWS % 128 != 0);
// Tiles begin at multiples of this, so that scale blocks end at multiples of it too, counted from a tile's first row.
constexpr int UNIT = TILE_ROWS % 128 == 0 ? 128 : TILE_ROWS & -TILE_ROWS;
static_assert(!TOKENS_FIRST || TILE_ROWS <= 128 + UNIT, "a tile lies in two scale blocks at most");
constexpr int PRODUCERS = CONSUMER_REGISTERS ? 128 : 32;

// A token's 64 sums in bf16, and 16 bytes so that eight tokens fall into different banks. With tokens first they lie
// swizzled in boxes of 16 tokens. Where the copy engine writes them, each warp has several boxes, or all that it needs
// in the tile's last stage in place of its tokens.
constexpr int OUT_PITCH = 144;
constexpr int BOX_BYTES = 16 * 128;
constexpr bool STORE_BOXES = OUT_BOXES > 0 || IN_RING;
static_assert(!STORE_BOXES || (TOKENS_FIRST && TILE_ROWS % 64 == 0), "boxes of 16 tokens and 64 rows");
static_assert(!IN_RING || TILE_ROWS <= 64 * SLICES, "a slice's tokens make room for a box");
// Boxes that a warp has.
constexpr int BOXES = OUT_BOXES > 0 ? OUT_BOXES : 1;
static_assert(TILE_ROWS / 64 % BOXES == 0 || !OUT_BOXES, "a tile begins with the first box");
constexpr int OUT_BYTES = IN_RING ? 0 : TOKENS_FIRST ? 4 * BOXES * BOX_BYTES : TOKENS * OUT_PITCH;
constexpr int SUM_BYTES = K_GROUPS > 1 ? 64 * WIDTH * 4 : 0;

// Shared memory, as addresses of the tensor core and the copy engine, and as pointers.
struct Shared {
    u32 weight, tokens, scales, out, full, empty, turns;
    const float* scale_values;
    const char* values;  // from the first weight on
    float4* sums;
};

struct Operands {
    const float* weight_scale;
    const TensorMap* out_boxes;
    u16* out;
    int columns, blocks;
};

struct Tile {
    int first_token;
    int token_count;
    int first_row;   // of the expert's weight
    int weight_row;  // of all experts' weights
    int scale_row;   // of all experts' scales, where this expert's begin
    bool weight_shared;
};

// Of an expert with so many chunks of tokens and parts of the weight. A cluster has neighbouring parts and one chunk.
// With SHARE_WEIGHT it has neighbouring chunks and one part, but for chunks that are left over.
__device__ __forceinline__ int clusters_of(int chunks, int parts) {
    const int left = parts % CLUSTER;
    const int last = SHARE_WEIGHT ? left * (chunks / CLUSTER) + chunks % CLUSTER : chunks;
    return parts / CLUSTER * chunks + (left ? last : 0);
}

// Tiles of all experts, one after the other: for each CLUSTER parts of the weight the chunks of tokens.
struct Schedule {
    const int* first_row;   // [groups + 1], tokens before an expert
    const int* first_tile;  // [groups + 1], tiles before an expert
    int groups, columns, group, number;
    Tile next;
    bool more;

    // Find the next tile; its divisions take time.
    __device__ __forceinline__ void look_ahead() {
        more = find(number, next);
        number += gridDim.x;
    }

    __device__ __forceinline__ bool find(int number, Tile& tile) {
        while (group < groups && number >= first_tile[group + 1]) group++;
        if (group == groups) return false;
        const int rows = first_row[group + 1] - first_row[group];
        const int chunks = (rows + TOKENS - 1) / TOKENS;
        constexpr int UNIT_TOKENS = TOKENS_FIRST ? 64 : 16;
        const int size = ((rows + chunks - 1) / chunks + UNIT_TOKENS - 1) / UNIT_TOKENS * UNIT_TOKENS;
        const int local = number - first_tile[group], cluster = local / CLUSTER, rank = local % CLUSTER;
        int chunk = cluster % chunks, part = cluster / chunks * CLUSTER + rank;
        tile.weight_shared = false;
        if constexpr (SHARE_WEIGHT) {
            const int first_part = part - rank, parts = (columns + TILE_ROWS - 1) / TILE_ROWS - first_part;
            const int together = chunks / CLUSTER, shared = min(CLUSTER, parts) * together;
            tile.weight_shared = chunk < shared;
            part = tile.weight_shared ? first_part + chunk / together : part;
            chunk = tile.weight_shared ? chunk % together * CLUSTER + rank : chunk - shared + together * CLUSTER;
        }
        tile.first_token = first_row[group] + chunk * size;
        tile.token_count = min(size, rows - chunk * size);
        tile.first_row = part * TILE_ROWS;
        tile.weight_row = group * columns + tile.first_row;
        tile.scale_row = group * ((columns + 127) / 128);
        return true;
    }
};

// Shuffled, so that the compiler knows it to be one number a warp.
__device__ __forceinline__ int own_warpgroup() { return __shfl_sync(~0u, int(threadIdx.x / 128), 0); }

// Of a warpgroup's 64 rows of the first operand a thread has sums of two: this one, and the eighth behind it.
__device__ __forceinline__ int own_row() { return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4; }

// Where the ring stands, for the warp that fills it and for those who empty it.
struct Place {
    int stage = 0;
    u32 phase = 0;
    // Which warpgroup has the next turn, whether any had one, and what its own barrier waits for.
    int next_group = 0;
    bool begun = false;
    u32 turn_phase = 0;
    // The stage in which sums of the tile before lie, or -1.
    int kept = -1;
    // Go on by at most as many stages as there are.
    __device__ __forceinline__ void next(int count = 1) {
        stage += count;
        if (stage >= STAGES) stage -= STAGES, phase ^= 1;
    }
    __device__ __forceinline__ void skip(int count) {
        stage += count;
        phase ^= stage / STAGES & 1;
        stage %= STAGES;
    }
};

// Rows of a tile's weight before the next scale block, counted from its first row.
__device__ __forceinline__ int scale_border(const Tile& tile) {
    return TILE_ROWS % 128 == 0 ? 128 : 128 - tile.first_row % 128;
}

// Where the scales of a thread's rows of the weight are: of the two rows that it has as the first operand, or of the
// tile's first rows and those from its border on. Rows that are not stored get any.
struct WeightScales {
    const float* first;
    const float* second;

    WeightScales() = default;
    __device__ __forceinline__ WeightScales(const Operands& operands, const Tile& tile, int rows_before) {
        const int row = tile.first_row + (TOKENS_FIRST ? 0 : rows_before + (SPLIT ? own_row() : 0));
        const int last = (operands.columns - 1) / 128;
        const long long blocks = operands.blocks;
        first = operands.weight_scale + (tile.scale_row + min(row / 128, last)) * blocks;
        second = operands.weight_scale + (tile.scale_row + min((row + (TOKENS_FIRST ? 128 : 8)) / 128, last)) * blocks;
    }
    // Behind the last slice the operands and the tokens' scales are zeros; with a negative scale what is added is -0,
    // which changes no sum.
    __device__ __forceinline__ float2 load(int block, int blocks) const {
        if (block >= blocks) return make_float2(-1, -1);
        const float scale = __ldg(first + block);
        return make_float2(scale, SPLIT ? __ldg(second + block) : scale);
    }
};

// The scales of a thread's sums of a slice. Sums 4 j to 4 j + 3 are of rows lane / 4 (two) and that + 8 (two) of the
// first operand, and rows 8 j + 2 (lane % 4) and the next of the second.
template <int COUNT>
struct Scales {
    float first[TOKENS_FIRST ? 2 : COUNT / 2], second[!SPLIT ? 1 : TOKENS_FIRST ? 2 : COUNT / 2];

    __device__ __forceinline__ void set(int at, float2 token, float2 weight) {
        first[at] = __fmul_rn(token.x, weight.x), first[at + 1] = __fmul_rn(token.y, weight.x);
        if constexpr (SPLIT) second[at] = __fmul_rn(token.x, weight.y), second[at + 1] = __fmul_rn(token.y, weight.y);
    }

    // With tokens as the second operand; `token_scales` are those of the first token that the instruction has.
    __device__ __forceinline__ void read(const float* token_scales, float2 weight) {
#pragma unroll
        for (int j = 0; j < COUNT / 4; j++) {
            const float* place = token_scales + 8 * j + threadIdx.x % 4 * 2;
            set(2 * j, GROUPS > 1 ? make_float2(place[0], place[1]) : *reinterpret_cast<const float2*>(place), weight);
        }
    }

    // `border` and `column`, the instruction's first row of the second operand, are counted from the tile's first.
    __device__ __forceinline__ void fold(float* acc, const float (&raw)[COUNT], int border, int column) const {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            const int mine = TOKENS_FIRST ? i % 4 / 2 : i / 4 * 2 + i % 2;
            const bool other = SPLIT && (TOKENS_FIRST ? (column + i / 4 * 8) / UNIT * UNIT >= border : i % 4 > 1);
            acc[i] = __fmaf_rn(raw[i], other ? second[SPLIT ? mine : 0] : first[mine], acc[i]);
        }
    }
};

// This warp has read a stage: tell all who fill it. Arriving does not wait for loads that are on their way, which the
// next copy could overtake, so `finish_reads` must have been called, best while the tensor core works; or `read` is what
// `have_arrived` says of them (a warp's load is one instruction, so those who arrive know it of all lanes).
__device__ __forceinline__ void give_back(u32 barrier, bool read = true) {
    __syncwarp();
    const int lane = threadIdx.x % 32;
    if constexpr (CLUSTER == 1) {
        if (read && lane == 0) barrier_arrive(barrier);
    } else {
        if (read && lane < CLUSTER) barrier_arrive_at(barrier, lane);
    }
}

// 64 rows of the first operand times 2 COUNT of the second over 128 of K, from zero; `row` of the first and `column` of
// the second are counted from the tile's.
template <int COUNT>
__device__ __forceinline__ void multiply(
    float (&raw)[COUNT], const Shared& shared, int stage, int slice, int row, int column) {
    const u32 weight = shared.weight + stage * WEIGHT_BYTES + slice * SLICE_BYTES;
    const u32 tokens = shared.tokens + stage * TOKEN_BYTES + slice * TOKEN_SLICE_BYTES;
    const u64 a = tile_descriptor((TOKENS_FIRST ? tokens : weight) + row * 128);
    const u64 b = tile_descriptor((TOKENS_FIRST ? weight : tokens) + column * 128);
    wgmma_begin();
#pragma unroll
    for (int k = 0; k < 4; k++) wgmma(raw, a + 2 * k, b + 2 * k, k != 0);
    wgmma_end();
}

// Round and write N tokens x 64 rows of the weight through shared memory, 128 bytes a token.
template <int N>
__device__ __forceinline__ void store_transposed_sums(
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
        const char* source = shared.values + (shared.out - shared.weight) + group * OUT_BYTES + thread % 8 * 16;
        for (int token = thread / 8; token < tile.token_count; token += 16) {
            const long long place = (long long)(tile.first_token + token) * operands.columns + tile.first_row + row;
            *reinterpret_cast<uint4*>(operands.out + place) =
                *reinterpret_cast<const uint4*>(source + token * OUT_PITCH);
        }
    }
}

// The same for 64 tokens x TILE_ROWS rows of the weight, 64 of these at a time; each warp has 16 of the tokens.
__device__ __forceinline__ void store_sums(
    const float (&acc)[TILE_ROWS / 2], const Shared& shared, const Operands& operands, const Tile& tile,
    int tokens_before, int stage) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 boxes = IN_RING ? shared.tokens + stage * TOKEN_BYTES + warp * BOX_BYTES
                              : shared.out + warp * BOXES * BOX_BYTES;
    const int first_token = tokens_before + warp % 4 * 16;
    // Shuffled, so that the compiler knows that a warp goes one way.
    const bool whole = STORE_BOXES && __shfl_sync(~0u, int(first_token + 16 <= tile.token_count), 0);
#pragma unroll
    for (int first = 0; first < TILE_ROWS; first += 64) {
        const u32 box = boxes + (IN_RING ? first / 64 * TOKEN_SLICE_BYTES : first / 64 % BOXES * BOX_BYTES);
        if (IN_RING && first == 0) warpgroup_sync(own_warpgroup());
        if (OUT_BOXES > 0 && lane == 0) {
            if (whole) wait_for_boxes_but<BOXES - 1>();
            else wait_for_boxes_but<0>();
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4; i++) {
            // Four matrices of eight rows of the weight: tokens 0 to 7, 8 to 15, and of the next eight rows.
            const int left = first / 8 + 2 * i, right = min(left + 1, TILE_ROWS / 8 - 1);
            if (left >= TILE_ROWS / 8) break;
            const int token = lane % 16, chunk = 2 * i + lane / 16;
            store_matrices(
                box + token * 128 + (chunk ^ token % 8) * 16,
                pack_bf16(acc[4 * left], acc[4 * left + 1]), pack_bf16(acc[4 * left + 2], acc[4 * left + 3]),
                pack_bf16(acc[4 * right], acc[4 * right + 1]), pack_bf16(acc[4 * right + 2], acc[4 * right + 3]));
        }
        if (whole) {
            publish_to_units();
            __syncwarp();
            if (lane == 0) {
                store_box(operands.out_boxes, box, tile.first_row + first, tile.first_token + first_token);
            }
            continue;
        }
        __syncwarp();
        const int row = first + lane % 8 * 8;
        if (row >= TILE_ROWS || tile.first_row + row >= operands.columns) continue;
#pragma unroll
        for (int token = lane / 8; token < 16; token += 4) {
            if (first_token + token >= tile.token_count) break;
            const long long target =
                (long long)(tile.first_token + first_token + token) * operands.columns + tile.first_row + row;
            *reinterpret_cast<uint4*>(operands.out + target) = *reinterpret_cast<const uint4*>(
                shared.values + (box - shared.weight) + token * 128 + (lane % 8 ^ token % 8) * 16);
        }
    }
}

template <int N>
__device__ __forceinline__ void store(
    const float (&acc)[N / 2], const Shared& shared, const Operands& operands, const Tile& tile, int rows_before,
    int stage) {
    if constexpr (TOKENS_FIRST) {
        store_sums(acc, shared, operands, tile, rows_before, stage);
    } else {
        store_transposed_sums<N>(acc, shared, operands, tile, rows_before);
    }
}

// Where a thread's tokens' scales begin in a slice's: with tokens first those of the first of its two tokens.
__device__ __forceinline__ int own_token_scales(const Tile& tile, int row_group) {
    return tile.first_token % 4 + (TOKENS_FIRST ? row_group * 64 + own_row() : 0);
}

__device__ __forceinline__ const float* token_scales_of(const Shared& shared, const Place& place, int slice, int own) {
    return shared.scale_values + place.stage * (SCALE_BYTES / 4) + slice * SCALE_BOX + own;
}

// With tokens first, the scales of a thread's two.
__device__ __forceinline__ float2 two_of(const float* token_scales) {
    return make_float2(token_scales[0], token_scales[8]);
}

// Multiply a tile of N rows of the second operand in K_GROUPS warpgroups that take stages in turn: all multiply at the
// same time, and the accumulator passes from one to the next, thread by thread, through shared memory.
template <int N>
__device__ __forceinline__ void multiply_tile_in_turns(
    const Tile& tile, const Shared& shared, const Operands& operands, Place& place, Schedule& schedule) {
    constexpr int COUNT = N / 2;
    const int group = own_warpgroup(), thread = threadIdx.x % 128;
    const int turns = (operands.blocks + SLICES - 1) / SLICES;
    const WeightScales weight_scales(operands, tile, 0);
    const int own = own_token_scales(tile, 0);
    int turn = (group - place.next_group + K_GROUPS) % K_GROUPS;
    Place mine = place;
    mine.next(turn);
    place.skip(turns);
    place.next_group = (place.next_group + turns) % K_GROUPS;
    for (; turn < turns; turn += K_GROUPS, mine.next(K_GROUPS)) {
        const int block = turn * SLICES;
        float raw[SLICES][COUNT];
        float2 weight[SLICES];
        Scales<COUNT> scales[SLICES];
#pragma unroll
        for (int s = 0; s < SLICES; s++) weight[s] = weight_scales.load(block + s, operands.blocks);
        barrier_wait(shared.full + 8 * mine.stage, mine.phase);
#pragma unroll
        for (int s = 0; s < SLICES; s++) multiply<COUNT>(raw[s], shared, mine.stage, s, 0, 0);
#pragma unroll
        for (int s = 0; s < SLICES; s++) {
            const float* token_scales = token_scales_of(shared, mine, s, own);
            if constexpr (TOKENS_FIRST) scales[s].set(0, two_of(token_scales), weight[s]);
            else scales[s].read(token_scales, weight[s]);
        }
        finish_reads();
        wgmma_wait(0);
#pragma unroll
        for (int s = 0; s < SLICES; s++) hold(raw[s]);
        give_back(shared.empty + 8 * mine.stage);

        float acc[COUNT] = {};
        if (turn > 0 || place.begun) {
            barrier_wait(shared.turns + 8 * group, place.turn_phase);
            place.turn_phase ^= 1;
        }
        if (turn > 0) {
#pragma unroll
            for (int i = 0; i < COUNT / 4; i++) {
                const float4 four = shared.sums[i * 128 + thread];
                acc[4 * i] = four.x, acc[4 * i + 1] = four.y, acc[4 * i + 2] = four.z, acc[4 * i + 3] = four.w;
            }
        }
#pragma unroll
        for (int s = 0; s < SLICES; s++) scales[s].fold(acc, raw[s], scale_border(tile), 0);
        if (turn < turns - 1) {
#pragma unroll
            for (int i = 0; i < COUNT / 4; i++) {
                shared.sums[i * 128 + thread] = make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]);
            }
        }
        __syncwarp();
        if (thread % 32 == 0) barrier_arrive(shared.turns + 8 * ((group + 1) % K_GROUPS));
        if (turn == turns - 1) store<N>(acc, shared, operands, tile, 0, mine.stage);
    }
    place.begun = true;
    schedule.look_ahead();
}

// The stage in which the last tile's sums lay, once the copy engine has read them.
__device__ __forceinline__ void give_back_kept(const Shared& shared, Place& place) {
    if (!IN_RING || place.kept < 0) return;
    if (threadIdx.x % 32 == 0) wait_for_boxes_but<0>();
    finish_reads();
    give_back(shared.empty + 8 * place.kept);
    place.kept = -1;
}

// The scales of the weight in a stage, for each slice and block of rows, and where those of the next are: computing that
// anew would take more instructions than all else beside the tensor core's and the folds.
struct StageScales {
    float2 of[SLICES][ROW_BLOCKS];
    WeightScales from[ROW_BLOCKS];
    int left;  // slices that the tile has, from this stage on

    __device__ __forceinline__ void begin(const Operands& operands, const Tile& tile, int row_group) {
#pragma unroll
        for (int r = 0; r < ROW_BLOCKS; r++) {
            from[r] = WeightScales(operands, tile, (row_group * ROW_BLOCKS + r) * 64);
        }
        left = operands.blocks;
        load();
    }
    __device__ __forceinline__ void advance() {
#pragma unroll
        for (int r = 0; r < ROW_BLOCKS; r++) from[r].first += SLICES, from[r].second += SLICES;
        left -= SLICES;
        load();
    }
    __device__ __forceinline__ void load() {
#pragma unroll
        for (int r = 0; r < ROW_BLOCKS; r++) {
#pragma unroll
            for (int s = 0; s < SLICES; s++) of[s][r] = from[r].load(s, left);
        }
    }
};

// Multiply a tile of N rows of the second operand. `next` has the scales of its first stage, and gets those of the next
// tile's.
template <int N>
__device__ __forceinline__ void multiply_tile(
    const Tile& tile, const Shared& shared, const Operands& operands, Place& place, Schedule& schedule,
    StageScales& next, int row_group) {
    constexpr int COUNT = N / TOKEN_PARTS / 2, PARTS = SLICES * ROW_BLOCKS * TOKEN_PARTS;
    constexpr int HELD = BUFFERS < PARTS ? BUFFERS : PARTS;
    const auto rows_before = [&](int r) { return (row_group * ROW_BLOCKS + r) * 64; };
    // Best while the tensor core works; but what it needs takes instructions and registers of the loop, which pays where
    // nothing else is left at a tile's end (measured).
    constexpr bool LOOK_AHEAD_EARLY = IN_RING;
    // Before a stage is given back: the fence waits for everything on its way, the next scales too. With one buffer of
    // sums waiting for what was read alone is faster, with several it is not (measured).
    constexpr bool FENCE = HELD > 1;
    if (TOKENS_FIRST && rows_before(0) >= tile.token_count) {
        give_back_kept(shared, place);
        schedule.look_ahead();
        next.begin(operands, schedule.next, row_group);
        for (int block = 0; block < operands.blocks; block += SLICES, place.next()) {
            barrier_wait(shared.full + 8 * place.stage, place.phase);
            finish_reads();
            give_back(shared.empty + 8 * place.stage);
        }
        return;
    }
    float acc[ROW_BLOCKS][N / 2] = {}, raw[HELD][COUNT];
    int border = scale_border(tile), own = own_token_scales(tile, row_group);
    compute_once(border), compute_once(own);
    for (int block = 0; block < operands.blocks; block += SLICES) {
        const StageScales weight = next;
        const bool keep = IN_RING && block + SLICES >= operands.blocks;
        float2 tokens[SLICES];
        bool read = true;
        // Parts of a stage in order: slices, their blocks of rows, their parts of the tokens.
        const auto start = [&](int part) {
            const int t = part % TOKEN_PARTS, r = part / TOKEN_PARTS % ROW_BLOCKS, s = part / TOKEN_PARTS / ROW_BLOCKS;
            multiply<COUNT>(raw[part % HELD], shared, place.stage, s, rows_before(r), 2 * t * COUNT);
        };
        const auto finish = [&](int part) {
            const int t = part % TOKEN_PARTS, r = part / TOKEN_PARTS % ROW_BLOCKS, s = part / TOKEN_PARTS / ROW_BLOCKS;
            const bool last = part == PARTS - 1;
            const float* token_scales = token_scales_of(shared, place, s, own);
            Scales<COUNT> scales;
            // Two numbers can wait in registers for the tensor core, as many as there are sums cannot.
            if constexpr (TOKENS_FIRST) {
                if (t == 0) {
                    tokens[s] = two_of(token_scales);
                    if (!FENCE) read = read && have_arrived(tokens[s].x, tokens[s].y);
                }
                scales.set(0, tokens[s], weight.of[s][r]);
                if (FENCE && last) finish_reads();
            }
            wgmma_wait(min(HELD - 1, PARTS - 1 - part));
            hold(raw[part % HELD]);
            if constexpr (TOKENS_FIRST) {
                if (last && !keep) give_back(shared.empty + 8 * place.stage, read);
            } else {
                scales.read(token_scales + 2 * t * COUNT, weight.of[s][r]);
            }
            scales.fold(acc[r] + t * COUNT, raw[part % HELD], border, 2 * t * COUNT);
        };
        barrier_wait(shared.full + 8 * place.stage, place.phase);
#pragma unroll
        for (int part = 0; part < HELD - 1; part++) start(part);
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            if (part + HELD - 1 < PARTS) start(part + HELD - 1);
            if (part == 0) {
                next.advance();
                if (block == 0) {
                    give_back_kept(shared, place);
                    if (LOOK_AHEAD_EARLY) schedule.look_ahead();
                }
            }
            finish(part);
        }
        if constexpr (!TOKENS_FIRST) {
            finish_reads();
            give_back(shared.empty + 8 * place.stage);
        }
        if (keep) place.kept = place.stage;
        place.next();
    }
    if (!LOOK_AHEAD_EARLY) schedule.look_ahead();
    next.begin(operands, schedule.next, row_group);
#pragma unroll
    for (int r = 0; r < ROW_BLOCKS; r++) store<N>(acc[r], shared, operands, tile, rows_before(r), place.kept);
}

// The instruction's width is a compile-time number: find the one that holds the tile's tokens.
template <int N>
__device__ __forceinline__ void multiply_tile_from(
    const Tile& tile, const Shared& shared, const Operands& operands, Place& place, Schedule& schedule,
    StageScales& next, int row_group) {
    if constexpr (!TOKENS_FIRST && N < TOKENS) {
        if (tile.token_count > N) {
            multiply_tile_from<N + 16>(tile, shared, operands, place, schedule, next, row_group);
            return;
        }
    }
    if constexpr (K_GROUPS > 1) {
        multiply_tile_in_turns<N>(tile, shared, operands, place, schedule);
    } else {
        multiply_tile<N>(tile, shared, operands, place, schedule, next, row_group);
    }
}

// Tokens and tiles before each expert, summed by one warp, 32 experts at a time.
__device__ __forceinline__ void count_tiles(
    const long long* counts, int rows, int groups, int parts, int* first_row, int* first_tile) {
    const int lane = threadIdx.x % 32;
    int rows_before = 0, tiles_before = 0;
    for (int start = 0; start < groups; start += 32) {
        const int index = start + lane;
        int tokens = 0;
        if (index < groups) tokens = counts ? int(counts[index]) : rows;
        int tiles = clusters_of((tokens + TOKENS - 1) / TOKENS, parts) * CLUSTER;
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
extern "C" __global__ void __cluster_dims__(CLUSTER) __launch_bounds__(128 * CONSUMERS + PRODUCERS, 1) fp8_stream(
    const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap x_scale,
    const __grid_constant__ TensorMap weight, const __grid_constant__ TensorMap out_boxes, const float* weight_scale,
    const long long* counts, u16* out, int rows, int columns, int blocks, int groups) {
    char* memory = shared_memory();
    // The last stage's instructions read ROWS rows.
    char* token_values = memory + STAGES * WEIGHT_BYTES + (TOKENS_FIRST ? 0 : ROWS - TILE_ROWS) * 128;
    char* out_values = token_values + STAGES * TOKEN_BYTES;
    char* scale_values = out_values + CONSUMERS * OUT_BYTES;
    char* sum_values = scale_values + STAGES * SCALE_BYTES;
    u64* barriers = reinterpret_cast<u64*>(sum_values + SUM_BYTES);
    int* first_row = reinterpret_cast<int*>(barriers + 2 * STAGES + K_GROUPS);
    int* first_tile = first_row + GROUPS + 1;
    const u32 full = shared_address(barriers), empty = full + 8 * STAGES, turns = empty + 8 * STAGES;
    const Shared shared{shared_address(memory), shared_address(token_values), shared_address(scale_values),
                        shared_address(out_values), full, empty, turns, reinterpret_cast<const float*>(scale_values),
                        memory, reinterpret_cast<float4*>(sum_values)};

    const int warp = __shfl_sync(~0u, int(threadIdx.x / 32), 0);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(full + 8 * i, 1);
            barrier_init(empty + 8 * i, 4 * ROW_GROUPS * CLUSTER);
        }
        for (int i = 0; i < K_GROUPS; i++) barrier_init(turns + 8 * i, 4);
        barrier_init_fence();
    }
    if (threadIdx.x == 64) prefetch_map(&weight), prefetch_map(&x), prefetch_map(&x_scale), prefetch_map(&out_boxes);
    if (warp == 1) {
        if (counts) wait_for_kernel_before();
        count_tiles(counts, rows, groups, (columns + TILE_ROWS - 1) / TILE_ROWS, first_row, first_tile);
    }
    __syncthreads();
    if constexpr (CLUSTER > 1) cluster_sync();

    Schedule schedule{first_row, first_tile, groups, columns, 0, int(blockIdx.x)};
    schedule.look_ahead();
    Place place;
    if (warp < 4 * CONSUMERS) {
        if constexpr (CONSUMER_REGISTERS > 0) take_registers<CONSUMER_REGISTERS>();
        wait_for_kernel_before();
        const Operands operands{weight_scale, &out_boxes, out, columns, blocks};
        const int row_group = ROW_GROUPS == 1 ? 0 : own_warpgroup();
        StageScales next;
        if (schedule.more) next.begin(operands, schedule.next, row_group);
        while (schedule.more) {
            const Tile tile = schedule.next;
            multiply_tile_from<TOKENS_FIRST ? TILE_ROWS : 16>(
                tile, shared, operands, place, schedule, next, row_group);
        }
        if (STORE_BOXES && threadIdx.x % 32 == 0) finish_boxes();
    } else {
        if constexpr (CONSUMER_REGISTERS > 0) give_registers<24>();
        if (warp > 4 * CONSUMERS || threadIdx.x % 32 > 0) return;
        wait_for_kernel_before();
        let_next_kernel_start();
        const u32 rank = CLUSTER > 1 ? cluster_rank() : 0;
        place.phase = 1;
        for (; schedule.more; schedule.look_ahead()) {
            const Tile tile = schedule.next;
            const int boxes = SHARE_TOKENS ? TOKENS / TOKEN_BOX : (tile.token_count + TOKEN_BOX - 1) / TOKEN_BOX;
            for (int block = 0; block < blocks; block += SLICES) {
                const u32 ready = full + 8 * place.stage;
                barrier_wait(empty + 8 * place.stage, place.phase);
                barrier_expect(ready, WEIGHT_BYTES + SLICES * (boxes * TOKEN_BOX * 128 + SCALE_BOX * 4));
                // What is shared is copied in parts, this program's to all.
                const u32 weight_target = shared.weight + place.stage * WEIGHT_BYTES;
                if constexpr (SHARE_WEIGHT) {
#pragma unroll
                    for (u32 i = 0; i < CLUSTER; i++) {
                        const int slice = i * (SLICES / CLUSTER), row = SLICES > 1 ? 0 : i * (TILE_ROWS / CLUSTER);
                        const u32 target = weight_target + slice * SLICE_BYTES + row * 128;
                        if (!tile.weight_shared) {
                            copy_slices(target, &weight, ready, tile.weight_row + row, block + slice);
                        } else if (i == rank) {
                            copy_slices_to_all<CLUSTER>(
                                target, &weight, ready, tile.weight_row + row, block + slice);
                        }
                    }
                } else {
                    copy_slices(weight_target, &weight, ready, tile.weight_row, block);
                }
                const u32 token_target = shared.tokens + place.stage * TOKEN_BYTES;
                if constexpr (SHARE_TOKENS) {
                    const int slice = rank * (SLICES / CLUSTER);
                    const int token = SLICES > 1 ? 0 : rank * TOKEN_BOX;
                    copy_slices_to_all<CLUSTER>(
                        token_target + slice * TOKEN_SLICE_BYTES + token * 128, &x, ready, tile.first_token + token,
                        block + slice);
                } else {
                    for (int box = 0; box < boxes; box++) {
                        const int token = tile.first_token + box * TOKEN_BOX;
                        copy_slices(token_target + box * TOKEN_BOX * 128, &x, ready, token, block);
                    }
                }
                copy_tile(shared.scales + place.stage * SCALE_BYTES, &x_scale, ready, tile.first_token / 4 * 4, block);
                place.next();
            }
        }
    }
    // Another program of the cluster may still write to this one's memory.
    if constexpr (CLUSTER > 1) cluster_sync();
}

// What follows from the tile configuration of fp8_gemm.cu: sizes of a stage and of the output, and shared memory.

#pragma once

#include "hopper.cuh"

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
    !SHARE_TOKENS || (K_BLOCKS > 1 ? K_BLOCKS % CLUSTER == 0 : TOKENS == CLUSTER * TOKEN_BOX),
    "each CTA of a cluster copies as many of a stage's tokens");
static_assert(
    !SHARE_WEIGHT || (K_BLOCKS > 1 ? K_BLOCKS % CLUSTER == 0 : TILE_ROWS % (8 * CLUSTER) == 0),
    "or of the weight's rows");
static_assert(K_BLOCKS == 1 || TOKENS == TOKEN_BOX, "a copy of several K-blocks holds all tokens");
constexpr int K_BLOCK_BYTES = TILE_ROWS * 128;
constexpr int WEIGHT_BYTES = K_BLOCKS * K_BLOCK_BYTES;
constexpr int TOKEN_K_BLOCK_BYTES = (TOKENS + TOKEN_BOX - 1) / TOKEN_BOX * TOKEN_BOX * 128;
constexpr int TOKEN_BYTES = K_BLOCKS * TOKEN_K_BLOCK_BYTES;

// Copies begin at a multiple of 16 bytes; an expert's first token may lie up to three scales behind.
constexpr int SCALE_BOX = TOKENS + (GROUPS > 1 ? 4 : 0);
constexpr int SCALE_BYTES = (K_BLOCKS * SCALE_BOX * 4 + 127) / 128 * 128;

// Rows of the weight that a thread has may lie in two scale blocks if tiles do not fit into them.
constexpr bool SPLIT = 128 % TILE_ROWS != 0 && (TOKENS_FIRST || TILE_ROWS % 128 != 0);
// Tiles begin at multiples of this, so that scale blocks end at multiples of it too, counted from a tile's first row.
constexpr int UNIT = TILE_ROWS % 128 == 0 ? 128 : TILE_ROWS & -TILE_ROWS;
static_assert(!TOKENS_FIRST || TILE_ROWS <= 128 + UNIT, "a tile lies in two scale blocks at most");
constexpr int PRODUCERS = CONSUMER_REGISTERS ? 128 : 32;

// A token's 64 sums in bf16, and 16 bytes so that eight tokens fall into different banks. With tokens first they lie
// swizzled in boxes of 16 tokens. Where TMA writes them, each warp has several boxes, or all that it needs
// in the tile's last stage in place of its tokens.
constexpr int OUT_PITCH = 144;
constexpr int BOX_BYTES = 16 * 128;
constexpr bool STORE_BOXES = OUT_BOXES > 0 || IN_RING;
static_assert(!STORE_BOXES || (TOKENS_FIRST && TILE_ROWS % 64 == 0), "boxes of 16 tokens and 64 rows");
static_assert(!IN_RING || TILE_ROWS <= 64 * K_BLOCKS, "a K-block's tokens make room for a box");
// Boxes that a warp has.
constexpr int BOXES = OUT_BOXES > 0 ? OUT_BOXES : 1;
static_assert(TILE_ROWS / 64 % BOXES == 0 || !OUT_BOXES, "a tile begins with the first box");
constexpr int OUT_BYTES = IN_RING ? 0 : TOKENS_FIRST ? 4 * BOXES * BOX_BYTES : TOKENS * OUT_PITCH;
constexpr int SUM_BYTES = K_GROUPS > 1 ? 64 * WIDTH * 4 : 0;

// Shared memory, as addresses of the tensor core and TMA, and as pointers.
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

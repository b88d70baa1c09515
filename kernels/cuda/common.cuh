// What all kernels here share: the shape of the cells, and the numbers in them.
//
// The text is compiled when an engine starts, for one model: the shape is constants, given as macros.
//   ELEMENT        Bf16 or float: what cells hold
//   HEADS          query heads
//   KV_HEADS       key/value heads
//   PARTS          vectors of a token and KV head in a cell: 2 (key, value), or 1 (a latent)
//   HEAD_DIM       numbers of one vector
//   BLOCK_TOKENS   tokens of one cell
//
// A cell is ELEMENT[PARTS][KV_HEADS][BLOCK_TOKENS][HEAD_DIM], the same bytes here, in the node's memory and on the wire. The cell of
// (slot, layer) begins at slot * slot_bytes + layer * cell_bytes; `cells` points at the cell of slot 0 of the layer that is meant.
// No header of CUDA's is needed: NVRTC finds none on most machines.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// The upper half of a float.
struct Bf16 {
    u16 bits;
};

// Sixteen bytes, loaded by one instruction.
struct __align__(16) Vector {
    u32 word[4];
};

__device__ __forceinline__ float number(float x) { return x; }
__device__ __forceinline__ float number(Bf16 x) { return __uint_as_float((u32)x.bits << 16); }

// To the nearest, ties to even; what is not a number stays none.
__device__ __forceinline__ void put(float *to, float x) { *to = x; }
__device__ __forceinline__ void put(Bf16 *to, float x) {
    u32 bits = __float_as_uint(x);
    bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    to->bits = (u16)(nan ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// The numbers of a vector.
constexpr int NUMBERS = 16 / sizeof(ELEMENT);

__device__ __forceinline__ void numbers(Vector v, float (&out)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) out[i] = __uint_as_float(v.word[i]);
}
__device__ __forceinline__ void numbers(Vector v, float (&out)[8]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        out[2 * i] = __uint_as_float(v.word[i] << 16);
        out[2 * i + 1] = __uint_as_float(v.word[i] & 0xffff0000u);
    }
}

// Runs of HEAD_DIM numbers are copied in the widest unit that divides them.
constexpr u32 RUN_BYTES = HEAD_DIM * sizeof(ELEMENT);
template <u32 BYTES> struct UnitOf { typedef u16 Type; };
template <> struct UnitOf<4> { typedef u32 Type; };
template <> struct UnitOf<16> { typedef Vector Type; };
typedef UnitOf<RUN_BYTES % 16 == 0 ? 16 : RUN_BYTES % 4 == 0 ? 4 : 2>::Type Unit;
constexpr u32 RUN_UNITS = RUN_BYTES / sizeof(Unit);
// Runs of one token in a cell.
constexpr u32 RUNS = PARTS * KV_HEADS;

// Run `run` of token `offset` of the cell of a slot.
__device__ __forceinline__ u64 run_at(u64 slot_bytes, u32 slot, u32 run, u32 offset) {
    return slot * slot_bytes + (u64)(run * BLOCK_TOKENS + offset) * RUN_BYTES;
}

// What a step has written, from the device's pool into the node's memory: cells to cells, only the tokens that are new.
//
// `host` is page-locked memory of the node, mapped for the device, with the pool's shape. Runs on a stream of its own beside the next
// layers, on few multiprocessors: the bus is the limit. `spans`: slot, first token in the block, number of tokens. One block of threads
// takes a span at a time, so that one write to the bus is as long as it can be.

extern "C" __global__ void spill(const u8 *cells, u8 *host, u64 slot_bytes, const u32 *spans, u32 count) {
    for (u32 span = blockIdx.x; span < count; span += gridDim.x) {
        u32 slot = spans[3 * span], first = spans[3 * span + 1], tokens = spans[3 * span + 2];
        u32 units = tokens * RUN_UNITS;
        for (u32 at = threadIdx.x; at < RUNS * units; at += blockDim.x) {
            u64 begin = run_at(slot_bytes, slot, at / units, first);
            ((Unit *)(host + begin))[at % units] = ((const Unit *)(cells + begin))[at % units];
        }
    }
}

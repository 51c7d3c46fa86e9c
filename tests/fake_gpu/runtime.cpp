// A CUDA runtime without a GPU: device memory is the host's, copies are memmove, streams and events order nothing, kernels do nothing.
// Preloaded, it stands before libcudart; torch's allocator, streams, events and statistics then run as they are, on one device of 80 GiB.
// What is not defined here and torch asks for is made to return 0 by fake_gpu.build.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cuda_runtime_api.h>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>

#define API extern "C" __attribute__((visibility("default")))

namespace {
enum Kind { ORDINARY = 0, PINNED = 1, DEVICE = 2 };
struct Range { size_t size; Kind kind; };

// Never destroyed: libraries unregister after this file's destructors would have run.
std::mutex mutex;
auto& ranges = *new std::map<uintptr_t, Range>;
auto& kernels = *new std::unordered_map<const void*, std::string>;
auto& events = *new std::unordered_map<const void*, double>;

cudaError_t allocate(void** pointer, size_t size, Kind kind) {
  *pointer = nullptr;
  if (size == 0) return cudaSuccess;
  if (posix_memalign(pointer, 4096, size)) return cudaErrorMemoryAllocation;
  memset(*pointer, 0xff, size);  // NaN in every floating type: what nobody wrote shows
  std::lock_guard<std::mutex> lock(mutex);
  ranges[reinterpret_cast<uintptr_t>(*pointer)] = {size, kind};
  return cudaSuccess;
}

cudaError_t release(void* pointer) {
  {
    std::lock_guard<std::mutex> lock(mutex);
    ranges.erase(reinterpret_cast<uintptr_t>(pointer));
  }
  free(pointer);
  return cudaSuccess;
}

Kind kind_of(const void* pointer) {
  std::lock_guard<std::mutex> lock(mutex);
  auto address = reinterpret_cast<uintptr_t>(pointer);
  auto after = ranges.upper_bound(address);
  if (after == ranges.begin()) return ORDINARY;
  auto [start, range] = *std::prev(after);
  return address < start + range.size ? range.kind : ORDINARY;
}

template <typename Handle>
cudaError_t fresh(Handle* handle) {
  static uintptr_t number = 0x1000;
  std::lock_guard<std::mutex> lock(mutex);
  *handle = reinterpret_cast<Handle>(number += 16);
  return cudaSuccess;
}

cudaError_t record(cudaEvent_t event) {
  auto now = std::chrono::steady_clock::now().time_since_epoch();
  std::lock_guard<std::mutex> lock(mutex);
  events[event] = std::chrono::duration<double, std::milli>(now).count();
  return cudaSuccess;
}

// Every operation of torch is replaced in kernels.cpp; what still gets here is another library's kernel, and its result is garbage.
cudaError_t launch(const void* kernel) {
  static auto& told = *new std::set<const void*>;
  std::lock_guard<std::mutex> lock(mutex);
  if (told.insert(kernel).second) fprintf(stderr, "fake GPU: a kernel that computes nothing: %.200s\n", kernels[kernel].c_str());
  return cudaSuccess;
}
}  // namespace

// ------------------------------------------------------------------------------------------------------------------------ the device

API cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
API cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
API cudaError_t cudaSetDevice(int) { return cudaSuccess; }
API cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
API cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
API cudaError_t cudaMemGetInfo(size_t* left, size_t* all) { return *left = 79ul << 30, *all = 80ul << 30, cudaSuccess; }
API cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) { return *least = 0, *greatest = -5, cudaSuccess; }
API const char* cudaGetErrorString(cudaError_t) { return "an error of the fake GPU"; }
API const char* cudaGetErrorName(cudaError_t) { return "fake"; }

API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  memset(properties, 0, sizeof *properties);
  strcpy(properties->name, "fake GPU");
  properties->major = 9;
  properties->totalGlobalMem = 80ul << 30;
  properties->multiProcessorCount = 132;
  properties->warpSize = 32;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->maxThreadsPerBlock = 1024;
  return cudaSuccess;
}

API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : attribute == cudaDevAttrMultiProcessorCount ? 132 : 0;
  return cudaSuccess;
}

API cudaError_t cudaGetDriverEntryPointByVersion(
    const char*, void** function, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* result) {
  *function = nullptr;
  if (result) *result = cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

// ------------------------------------------------------------------------------------------------------------------------ memory

API cudaError_t cudaMalloc(void** pointer, size_t size) { return allocate(pointer, size, DEVICE); }
API cudaError_t cudaMallocAsync(void** pointer, size_t size, cudaStream_t) { return allocate(pointer, size, DEVICE); }
API cudaError_t cudaMallocManaged(void** pointer, size_t size, unsigned) { return allocate(pointer, size, DEVICE); }
API cudaError_t cudaHostAlloc(void** pointer, size_t size, unsigned) { return allocate(pointer, size, PINNED); }
API cudaError_t cudaMallocHost(void** pointer, size_t size) { return allocate(pointer, size, PINNED); }
API cudaError_t cudaFree(void* pointer) { return release(pointer); }
API cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) { return release(pointer); }
API cudaError_t cudaFreeHost(void* pointer) { return release(pointer); }

API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  memset(attributes, 0, sizeof *attributes);
  auto kind = kind_of(pointer);
  attributes->type = kind == DEVICE ? cudaMemoryTypeDevice : kind == PINNED ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  attributes->device = kind ? 0 : -1;
  if (kind) attributes->devicePointer = attributes->hostPointer = const_cast<void*>(pointer);
  return cudaSuccess;
}

API cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) { return memmove(to, from, size), cudaSuccess; }
API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t) {
  return memmove(to, from, size), cudaSuccess;
}
API cudaError_t cudaMemset(void* pointer, int value, size_t size) { return memset(pointer, value, size), cudaSuccess; }
API cudaError_t cudaMemsetAsync(void* pointer, int value, size_t size, cudaStream_t) { return memset(pointer, value, size), cudaSuccess; }

// ------------------------------------------------------------------------------------------------------------------------ streams

API cudaError_t cudaStreamCreate(cudaStream_t* stream) { return fresh(stream); }
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return fresh(stream); }
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) { return fresh(stream); }
API cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { return *priority = 0, cudaSuccess; }
API cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
API cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t*, const cudaGraphNode_t**, const cudaGraphEdgeData**,
    size_t*) {
  if (id) *id = 0;
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
API cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* data) { return function(data), cudaSuccess; }
API cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void* data, unsigned) {
  return function(stream, cudaSuccess, data), cudaSuccess;
}
API cudaError_t cudaEventCreate(cudaEvent_t* event) { return fresh(event); }
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return fresh(event); }
API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) { return record(event); }
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t, unsigned) { return record(event); }
API cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  std::lock_guard<std::mutex> lock(mutex);
  return *milliseconds = events[end] - events[start], cudaSuccess;
}

// ------------------------------------------------------------------------------------------------------------------------ kernels

API void** __cudaRegisterFatBinary(void*) {
  static void* handle[1];
  return handle;
}
API void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  std::lock_guard<std::mutex> lock(mutex);
  kernels[host] = name;
}
API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = *block = dim3{1, 1, 1};
  *shared = 0;
  *static_cast<void**>(stream) = nullptr;
  return cudaSuccess;
}
API cudaError_t __cudaGetKernel(void** kernel, const void* host) { return *kernel = const_cast<void*>(host), cudaSuccess; }
API cudaError_t __cudaLaunchKernel(void* kernel, dim3, dim3, void**, size_t, cudaStream_t) { return launch(kernel); }
API cudaError_t cudaLaunchKernel(const void* kernel, dim3, dim3, void**, size_t, cudaStream_t) { return launch(kernel); }
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void* kernel, void**) { return launch(kernel); }
API cudaError_t cudaLaunchCooperativeKernel(const void* kernel, dim3, dim3, void**, size_t, cudaStream_t) { return launch(kernel); }
API cudaError_t cudaGetSymbolAddress(void** pointer, const void*) {
  static char space[1 << 16];
  return *pointer = space, cudaSuccess;
}
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  attributes->binaryVersion = attributes->ptxVersion = 90;
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) { return *blocks = 2, cudaSuccess; }
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  return *blocks = 2, cudaSuccess;
}

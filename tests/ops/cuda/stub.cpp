// A libcuda.so.1 with the few functions of the driver that rwkv_miss calls, for two devices and without a GPU. It keeps
// contexts, modules and functions apart as the driver does. The test connects two functions of its own (stub_connect):
// one finds the emulated kernels of a module that is loaded, the other runs a launch.
#include <dlfcn.h>
#include <string.h>

#include <string>
#include <vector>

enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    NOT_FOUND = 500,
    CAPTURE_UNSUPPORTED = 900
};
constexpr int DEVICES = 2;

struct Context {
    int device;
};
struct Module {
    Context* context;
    void* library;  // the emulated kernels
};
struct Function {
    Module* module;
    std::string name;
    void* code;
    unsigned shared = 48 * 1024;  // the bytes of dynamic shared memory that a launch may give it
};

static Context contexts[DEVICES] = {{0}, {1}};
static int capabilities[DEVICES][2] = {{9, 0}, {7, 5}};
static int multiprocessors[DEVICES] = {3, 3};
static int shared_memory[DEVICES] = {227 * 1024, 64 * 1024};  // of a block, at most
constexpr int BLOCKS = 2;         // of any kernel that a multiprocessor runs at once
static int version = 13000;       // of CUDA: 13.0
static void* captured = nullptr;  // the stream that is recorded into a graph
static std::string calls;         // the names of the functions that were called, one a line
static thread_local std::vector<Context*> current;  // this thread's stack of contexts

typedef void* Load(int device, const void* image);
typedef int Launch(int device, const Function* function, const char* name, void* code, void* library, const unsigned* sizes,
                   void* stream, const void* parameters, size_t n_bytes);
static Load* on_load;
static Launch* on_launch;

extern "C" {

void stub_connect(Load* load, Launch* launch) {
    on_load = load;
    on_launch = launch;
}
void stub_set_driver_version(int x) { version = x; }
int stub_contexts_left_current() { return int(current.size()); }
void stub_capture(void* stream) { captured = stream; }
const char* stub_calls() { return calls.c_str(); }
void stub_forget_calls() { calls.clear(); }
#define CALLED calls += std::string(__func__) + '\n'

int cuInit(unsigned) {
    CALLED;
    return SUCCESS;
}
int cuDriverGetVersion(int* x) {
    CALLED;
    *x = version;
    return SUCCESS;
}
int cuDeviceGet(int* device, int index) {
    CALLED;
    if (index < 0 || index >= DEVICES) return INVALID_DEVICE;
    *device = index;
    return SUCCESS;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
    CALLED;
    switch (attribute) {
        case 16: *value = multiprocessors[device]; break;  // CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
        case 75: *value = capabilities[device][0]; break;  // _COMPUTE_CAPABILITY_MAJOR
        case 76: *value = capabilities[device][1]; break;  // _COMPUTE_CAPABILITY_MINOR
        case 97: *value = shared_memory[device]; break;    // _MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        default: return INVALID_VALUE;
    }
    return SUCCESS;
}
int cuDevicePrimaryCtxRetain(Context** context, int device) {
    CALLED;
    *context = &contexts[device];
    return SUCCESS;
}
int cuCtxPushCurrent(Context* context) {
    CALLED;
    current.push_back(context);
    return SUCCESS;
}
int cuCtxPopCurrent(Context** context) {
    CALLED;
    if (current.empty()) return INVALID_CONTEXT;
    if (context) *context = current.back();
    current.pop_back();
    return SUCCESS;
}
int cuStreamIsCapturing(void* stream, int* status) {
    CALLED;
    *status = captured && stream == captured;
    return SUCCESS;
}
int cuModuleLoadData(Module** module, const void* image) {
    CALLED;
    if (captured) return CAPTURE_UNSUPPORTED;
    if (current.empty()) return INVALID_CONTEXT;
    void* library = on_load(current.back()->device, image);
    if (!library) return INVALID_IMAGE;
    *module = new Module{current.back(), library};
    return SUCCESS;
}
int cuModuleGetFunction(Function** function, Module* module, const char* name) {
    CALLED;
    if (current.empty() || module->context != current.back()) return INVALID_CONTEXT;
    void* code = dlsym(module->library, name);
    if (!code) return NOT_FOUND;
    *function = new Function{module, name, code};
    return SUCCESS;
}
int cuFuncSetAttribute(Function* function, int attribute, int value) {
    CALLED;
    if (current.empty() || function->module->context != current.back()) return INVALID_CONTEXT;
    // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    if (attribute != 8 || value > shared_memory[function->module->context->device]) return INVALID_VALUE;
    function->shared = value;
    return SUCCESS;
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Function* function, int block, size_t shared) {
    CALLED;
    if (current.empty() || function->module->context != current.back()) return INVALID_CONTEXT;
    *blocks = block > 0 && shared <= function->shared ? BLOCKS : 0;
    return SUCCESS;
}
int cuLaunchKernel(Function* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared, void* stream, void** parameters, void** extra) {
    CALLED;
    if (current.empty() || function->module->context != current.back()) return INVALID_CONTEXT;
    // rwkv_miss passes parameters in one form alone: as a buffer and its size.
    if (parameters || !extra || extra[0] != (void*)1 || extra[2] != (void*)2 || extra[4]) return INVALID_VALUE;
    if (shared > function->shared) return INVALID_VALUE;
    const unsigned sizes[7] = {grid_x, grid_y, grid_z, block_x, block_y, block_z, shared};
    return on_launch(current.back()->device, function, function->name.c_str(), function->code, function->module->library,
                     sizes, stream, extra[1], *static_cast<size_t*>(extra[3]));
}

// cuda-bindings asks for every function of the driver by name. A missing one is an error only when it is called.
int cuGetProcAddress_v2(const char* name, void** function, int, unsigned long long, int* status) {
    static const struct {
        const char* name;
        void* function;
    } TABLE[] = {
#define ENTRY(x) {#x, (void*)x}
        ENTRY(cuInit),           ENTRY(cuDriverGetVersion),       ENTRY(cuDeviceGet),
        ENTRY(cuCtxPushCurrent), ENTRY(cuDeviceGetAttribute),     ENTRY(cuDevicePrimaryCtxRetain),
        ENTRY(cuCtxPopCurrent),  ENTRY(cuModuleLoadData),         ENTRY(cuModuleGetFunction),
        ENTRY(cuLaunchKernel),   ENTRY(cuStreamIsCapturing),      ENTRY(cuGetProcAddress_v2),
        ENTRY(cuFuncSetAttribute),
        ENTRY(cuOccupancyMaxActiveBlocksPerMultiprocessor),
    };
    *function = nullptr;
    for (const auto& entry : TABLE)
        if (!strcmp(entry.name, name)) *function = entry.function;
    if (status) *status = *function ? 0 : 1;
    return *function ? SUCCESS : NOT_FOUND;
}
}

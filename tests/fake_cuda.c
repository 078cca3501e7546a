/* A CUDA runtime and driver without a GPU: PyTorch's own CUDA library chooses kernels and waits for
   streams as on a GPU of the capability FAKE_CAPABILITY (90 is 9.0), and launches do nothing. */

#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>

#define DOES_NOTHING(name, ...) \
    cudaError_t name(__VA_ARGS__) { return cudaSuccess; }
#define GIVES(name, target, value, ...) \
    cudaError_t name(__VA_ARGS__) { *(target) = value; return cudaSuccess; }

static int capability(void) { return atoi(getenv("FAKE_CAPABILITY")); }

static long waits = 0;
long count_waits(void) { return waits; }
cudaError_t cudaStreamSynchronize(cudaStream_t s) { waits++; return cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) { waits++; return cudaSuccess; }

/* The device */

GIVES(cudaGetDeviceCount, n, 1, int *n)
GIVES(cudaGetDevice, d, 0, int *d)
DOES_NOTHING(cudaSetDevice, int d)
GIVES(cudaRuntimeGetVersion, v, CUDART_VERSION, int *v)
GIVES(cudaDriverGetVersion, v, CUDART_VERSION, int *v)
DOES_NOTHING(cudaGetLastError, void)
DOES_NOTHING(cudaPeekAtLastError, void)

cudaError_t cudaDeviceGetAttribute(int *v, enum cudaDeviceAttr a, int d)
{
    *v = a == cudaDevAttrComputeCapabilityMajor   ? capability() / 10
         : a == cudaDevAttrComputeCapabilityMinor ? capability() % 10
                                                  : 1;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int d)
{
    memset(p, 0, sizeof *p);
    p->major = capability() / 10;
    p->minor = capability() % 10;
    p->totalGlobalMem = 80ULL << 30;
    p->multiProcessorCount = 132;
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsPerMultiProcessor = 2048;
    return cudaSuccess;
}

/* Streams, events and memory */

GIVES(cudaDeviceGetStreamPriorityRange, low, (*high = -5, 0), int *low, int *high)
GIVES(cudaStreamCreateWithPriority, s, (cudaStream_t)1, cudaStream_t *s, unsigned f, int p)
DOES_NOTHING(cudaStreamQuery, cudaStream_t s)
DOES_NOTHING(cudaStreamWaitEvent, cudaStream_t s, cudaEvent_t e, unsigned f)
GIVES(cudaStreamIsCapturing, c, cudaStreamCaptureStatusNone, cudaStream_t s,
      enum cudaStreamCaptureStatus *c)
DOES_NOTHING(cudaThreadExchangeStreamCaptureMode, enum cudaStreamCaptureMode *m)
GIVES(cudaEventCreateWithFlags, e, (cudaEvent_t)1, cudaEvent_t *e, unsigned f)
DOES_NOTHING(cudaEventRecord, cudaEvent_t e, cudaStream_t s)
DOES_NOTHING(cudaEventRecordWithFlags, cudaEvent_t e, cudaStream_t s, unsigned f)
DOES_NOTHING(cudaEventQuery, cudaEvent_t e)
DOES_NOTHING(cudaEventDestroy, cudaEvent_t e)
GIVES(cudaMalloc, p, calloc(1, n), void **p, size_t n)
DOES_NOTHING(cudaFree, void *p)
GIVES(cudaMemGetInfo, f, *t = 80ULL << 30, size_t *f, size_t *t)
DOES_NOTHING(cudaMemcpyAsync, void *d, const void *s, size_t n, enum cudaMemcpyKind k,
             cudaStream_t t)
DOES_NOTHING(cudaMemsetAsync, void *d, int v, size_t n, cudaStream_t t)
DOES_NOTHING(cudaLaunchKernel, const void *f, dim3 g, dim3 b, void **a, size_t s, cudaStream_t t)
DOES_NOTHING(cudaFuncGetAttributes, struct cudaFuncAttributes *a, const void *f)
GIVES(cudaPointerGetAttributes, (int *)a, cudaMemoryTypeUnregistered,
      struct cudaPointerAttributes *a, const void *p)

/* The driver */

int cuDevicePrimaryCtxGetState(int d, unsigned *flags, int *active) { *flags = 0; return !(*active = 1); }

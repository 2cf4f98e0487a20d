//! NVIDIA's GPUs, through the driver, NVRTC and cuBLAS, which are loaded at run time.

use std::cell::Cell;
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::fmt;
use std::sync::{Arc, Mutex, OnceLock};

use cudarc::cublas::{result as cublas, sys as cublas_sys};
use cudarc::driver::result;
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};
use cudarc::nvrtc::{result as nvrtc, sys as nvrtc_sys};

use crate::driver::{Act, Address, Driver, Kernel, Product};
use crate::kernels::{Source, compiled};
use crate::{Error, Result, libraries};

/// Pinned memory through which small uploads go, so that the driver need not wait for the stream to copy them.
const STAGING: usize = 8 << 20;

/// One GPU, with a stream of its own.
pub(crate) struct Cuda {
    name: String,
    title: String,
    context: sys::CUcontext,
    stream: sys::CUstream,
    blas: cublas_sys::cublasHandle_t,
    architecture: String,
    compiler: String,
    processors: usize,
    staging: Mutex<Staging>,
    modules: Mutex<HashMap<Source, Vec<Kernel>>>,
}

struct Staging {
    at: *mut u8,
    used: usize,
}

// SAFETY: handles of the driver may be used from any thread in whose calls the context is current, which every method
// sees to; the staging memory is behind a lock.
unsafe impl Send for Cuda {}
// SAFETY: likewise; the driver's own calls are safe to make at the same time, and cuBLAS' are made under the lock of
// `modules`.
unsafe impl Sync for Cuda {}

impl fmt::Debug for Cuda {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cuda").field("name", &self.name).field("title", &self.title).finish_non_exhaustive()
    }
}

/// A module of kernels, unloaded with its last kernel.
struct Module(sys::CUmodule, sys::CUcontext);
// SAFETY: as for [`Cuda`].
unsafe impl Send for Module {}
// SAFETY: likewise.
unsafe impl Sync for Module {}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: the module was loaded in this context and is unloaded once. A process that ends has unloaded it already,
        // which is no error that anybody waits for.
        unsafe {
            if result::ctx::get_current().ok().flatten() == Some(self.1) {
                let _ = result::module::unload(self.0);
            }
        }
    }
}

fn initialise() -> Result<()> {
    static ONCE: OnceLock<std::result::Result<(), String>> = OnceLock::new();
    ONCE.get_or_init(|| {
        libraries::load().map_err(|e| e.to_string())?;
        result::init().map_err(|e| format!("the NVIDIA driver does not start ({e}); use --device cpu"))
    })
    .clone()
    .map_err(Error::Missing)
}

impl Cuda {
    /// Opens a GPU by its number.
    ///
    /// # Errors
    /// Missing libraries, no such GPU.
    pub(crate) fn new(index: usize) -> Result<Self> {
        initialise()?;
        let name = format!("cuda:{index}");
        let count = result::device::get_count().unwrap_or(0);
        if index >= count.max(0) as usize {
            let there = match count {
                0 => "there is no GPU".to_string(),
                1 => "there is one GPU, cuda:0".to_string(),
                n => format!("there are {n} GPUs, the last is cuda:{}", n - 1),
            };
            return Err(Error::Missing(format!("{name} is not there: {there}")));
        }
        let fail = |call| {
            let device = name.clone();
            move |e: result::DriverError| Error::Call { device, call, message: e.to_string() }
        };
        let device = result::device::get(index as i32).map_err(fail("cuDeviceGet"))?;
        // SAFETY: the device is valid; the context is kept for the process.
        let context =
            unsafe { result::primary_ctx::retain(device) }.map_err(fail("cuDevicePrimaryCtxRetain"))?;
        // SAFETY: the context is valid.
        unsafe { result::ctx::set_current(context) }.map_err(fail("cuCtxSetCurrent"))?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(fail("cuStreamCreate"))?;
        // SAFETY: the device is valid.
        let attribute =
            |a| unsafe { result::device::get_attribute(device, a) }.map_err(fail("cuDeviceGetAttribute"));
        let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let processors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        // SAFETY: the flags are none.
        let staging = unsafe { result::malloc_host(STAGING, 0) }.map_err(fail("cuMemHostAlloc"))?;
        let blas_error = |call, e: cublas::CublasError| Error::Call {
            device: name.clone(),
            call,
            message: format!("{e:?}"),
        };
        let blas = cublas::create_handle().map_err(|e| blas_error("cublasCreate", e))?;
        // SAFETY: both are valid; a CUstream and a cudaStream_t are the same.
        unsafe { cublas::set_stream(blas, stream.cast()) }.map_err(|e| blas_error("cublasSetStream", e))?;
        let (mut nvrtc_major, mut nvrtc_minor) = (0, 0);
        // SAFETY: two integers are written.
        unsafe { nvrtc_sys::nvrtcVersion(&mut nvrtc_major, &mut nvrtc_minor) };
        let title = result::device::get_name(device).unwrap_or_else(|_| "an NVIDIA GPU".into());
        Ok(Self {
            title: format!("{title}, compute capability {major}.{minor}"),
            context,
            stream,
            blas,
            architecture: format!("sm_{major}{minor}"),
            compiler: format!("NVRTC {nvrtc_major}.{nvrtc_minor}"),
            processors: processors.max(1) as usize,
            staging: Mutex::new(Staging { at: staging.cast(), used: 0 }),
            modules: Mutex::default(),
            name,
        })
    }

    fn current(&self) -> Result<()> {
        thread_local! {
            static CURRENT: Cell<usize> = const { Cell::new(0) };
        }
        if CURRENT.get() != self.context as usize {
            // SAFETY: the context is kept for the process.
            self.ok("cuCtxSetCurrent", unsafe { result::ctx::set_current(self.context) })?;
            CURRENT.set(self.context as usize);
        }
        Ok(())
    }

    fn ok<T>(&self, call: &'static str, result: std::result::Result<T, result::DriverError>) -> Result<T> {
        result.map_err(|e| Error::Call { device: self.name.clone(), call, message: e.to_string() })
    }

    fn wait(&self) -> Result<()> {
        // SAFETY: the stream is valid.
        self.ok("cuStreamSynchronize", unsafe { result::stream::synchronize(self.stream) })
    }

    /// The machine code of a file of kernels.
    fn cubin(&self, source: &Source, text: &str, options: &[String]) -> Result<Vec<u8>> {
        let fail = |log: String| Error::Compile {
            file: source.file.name(),
            device: format!("{} ({}, {})", self.name, self.architecture, self.compiler),
            log,
        };
        let text = CString::new(text).map_err(|e| fail(e.to_string()))?;
        let program = nvrtc::create_program(&text, None).map_err(|e| fail(format!("{e:?}")))?;
        // SAFETY: the program is valid, and destroyed once; buffers have the sizes that NVRTC says.
        unsafe {
            let compiled = nvrtc::compile_program(program, options);
            let made = match compiled {
                Err(e) => {
                    let log = nvrtc::get_program_log(program).unwrap_or_default();
                    let log: Vec<u8> = log.into_iter().map(|c| c as u8).filter(|c| *c != 0).collect();
                    let log = String::from_utf8_lossy(&log);
                    let errors: Vec<&str> =
                        log.lines().filter(|line| line.contains("error")).take(3).collect();
                    Err(fail(if errors.is_empty() { format!("{e:?} {log}") } else { errors.join("\n") }))
                }
                Ok(()) => {
                    let mut size = 0;
                    nvrtc_sys::nvrtcGetCUBINSize(program, &mut size)
                        .result()
                        .map_err(|e| fail(format!("{e:?}")))?;
                    let mut code = vec![0u8; size];
                    let got = nvrtc_sys::nvrtcGetCUBIN(program, code.as_mut_ptr().cast()).result();
                    got.map(|()| code).map_err(|e| fail(format!("{e:?}")))
                }
            };
            let _ = nvrtc::destroy_program(program);
            made
        }
    }
}

impl Driver for Cuda {
    fn name(&self) -> &str {
        &self.name
    }

    fn describe(&self) -> String {
        format!("{}, {}", self.title, self.compiler)
    }

    fn allocate(&self, bytes: usize) -> Result<Address> {
        self.current()?;
        // SAFETY: freed by `free`.
        let address = unsafe { result::malloc_sync(bytes) }.map_err(|e| match e.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => Error::Memory { device: self.name.clone(), bytes },
            _ => Error::Call { device: self.name.clone(), call: "cuMemAlloc", message: e.to_string() },
        })?;
        self.clear(address, bytes)?;
        Ok(address)
    }

    fn free(&self, address: Address, _: usize) {
        if self.current().is_ok() {
            // SAFETY: allocated by `allocate`; the driver waits for what still uses it.
            let _ = unsafe { result::free_sync(address) };
        }
    }

    fn upload(&self, to: Address, bytes: &[u8]) -> Result<()> {
        self.current()?;
        if bytes.len() > STAGING {
            // SAFETY: the destination is as large as the caller of this crate made it, and the copy is waited for.
            self.ok("cuMemcpyHtoD", unsafe { result::memcpy_htod_async(to, bytes, self.stream) })?;
            return self.wait();
        }
        let mut staging = self.staging.lock().unwrap_or_else(|e| e.into_inner());
        if staging.used + bytes.len() > STAGING {
            self.wait()?;
            staging.used = 0;
        }
        // SAFETY: within the staging memory, in a part that no copy under way reads.
        let from = unsafe {
            let from = std::slice::from_raw_parts_mut(staging.at.add(staging.used), bytes.len());
            from.copy_from_slice(bytes);
            from
        };
        staging.used += bytes.len().next_multiple_of(64);
        // SAFETY: as above; the staging memory is not written again before the stream has been waited for.
        self.ok("cuMemcpyHtoD", unsafe { result::memcpy_htod_async(to, from, self.stream) })
    }

    fn download(&self, from: Address, bytes: &mut [u8]) -> Result<()> {
        self.current()?;
        let mut staging = self.staging.lock().unwrap_or_else(|e| e.into_inner());
        self.wait()?;
        staging.used = 0;
        let mut at = from;
        for part in bytes.chunks_mut(STAGING) {
            // SAFETY: the source is as large as the caller of this crate made it; the copy is waited for.
            unsafe {
                let through = std::slice::from_raw_parts_mut(staging.at, part.len());
                self.ok("cuMemcpyDtoH", result::memcpy_dtoh_async(through, at, self.stream))?;
                self.wait()?;
                part.copy_from_slice(through);
            }
            at += part.len() as u64;
        }
        Ok(())
    }

    fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<()> {
        self.current()?;
        // SAFETY: both are as large as the caller of this crate made them.
        self.ok("cuMemcpyDtoD", unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream) })
    }

    fn clear(&self, at: Address, bytes: usize) -> Result<()> {
        self.current()?;
        // SAFETY: as large as the caller of this crate made it.
        self.ok("cuMemsetD8", unsafe { result::memset_d8_async(at, 0, bytes, self.stream) })
    }

    fn compile(&self, source: &Source) -> Result<Vec<Kernel>> {
        let known = || self.modules.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(kernels) = known().get(source) {
            return Ok(kernels.clone());
        }
        self.current()?;
        let text = source.text(false);
        // Lambdas of kernels are functions without an execution space of their own, which older versions take for the host's.
        let options = [
            format!("--gpu-architecture={}", self.architecture),
            "--std=c++17".into(),
            "--device-as-default-execution-space".into(),
        ];
        let target = format!("{}\n{}", self.compiler, options.join(" "));
        // Nothing is locked meanwhile: several compile at once.
        let path = compiled(&text, &target, "cubin", |_| self.cubin(source, &text, &options))?;
        let code = std::fs::read(&path).map_err(|source| Error::File { path, source })?;
        let mut modules = known();
        if let Some(kernels) = modules.get(source) {
            return Ok(kernels.clone());
        }
        // SAFETY: a CUBIN that NVRTC made; the driver checks it.
        let module = unsafe { result::module::load_data(code.as_ptr().cast()) };
        let module = self.ok("cuModuleLoadData", module)?;
        let kept: Arc<dyn Send + Sync> = Arc::new(Module(module, self.context));
        let names = source.file.kernels().iter();
        let kernels: Result<Vec<Kernel>> = names
            .map(|name| {
                let name = CString::new(*name).unwrap_or_default();
                // SAFETY: the module is valid.
                let function =
                    self.ok("cuModuleGetFunction", unsafe { result::module::get_function(module, name) })?;
                Ok(Kernel { handle: function as usize, threads: source.threads, _module: kept.clone() })
            })
            .collect();
        let kernels = kernels?;
        modules.insert(source.clone(), kernels.clone());
        Ok(kernels)
    }

    unsafe fn launch(&self, kernel: &Kernel, grid: [u32; 3], params: &[u8]) -> Result<()> {
        self.current()?;
        let mut arguments = [params.as_ptr() as *mut c_void];
        let block = (kernel.threads, 1, 1);
        // SAFETY: the handle is a function of a module that the kernel keeps; the driver copies the parameters before it
        // returns; the caller vouches for them.
        let launched = unsafe {
            result::launch_kernel(
                kernel.handle as sys::CUfunction,
                (grid[0], grid[1], grid[2]),
                block,
                0,
                self.stream,
                &mut arguments,
            )
        };
        self.ok("cuLaunchKernel", launched)
    }

    unsafe fn product(&self, p: &Product) -> Result<()> {
        self.current()?;
        let _one = self.modules.lock().unwrap_or_else(|e| e.into_inner());
        let (one, beta) = (1.0f32, if p.add { 1.0f32 } else { 0.0 });
        let of = match p.act {
            Act::F16 => cublas_sys::cudaDataType::CUDA_R_16F,
            Act::Bf16 => cublas_sys::cudaDataType::CUDA_R_16BF,
        };
        let [rows, inputs, outputs] = [p.rows, p.inputs, p.outputs].map(|n| n as i32);
        // SAFETY: the caller vouches for the sizes. Row-major matrices are cuBLAS' transposed ones: y^T = w x^T.
        let done = unsafe {
            cublas::gemm_ex(
                self.blas,
                cublas_sys::cublasOperation_t::CUBLAS_OP_T,
                cublas_sys::cublasOperation_t::CUBLAS_OP_N,
                outputs,
                rows,
                inputs,
                std::ptr::from_ref(&one).cast(),
                p.w as *const c_void,
                of,
                inputs,
                p.x as *const c_void,
                of,
                inputs,
                std::ptr::from_ref(&beta).cast(),
                p.y as *mut c_void,
                cublas_sys::cudaDataType::CUDA_R_32F,
                outputs,
                cublas_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                cublas_sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        };
        done.map_err(|e| Error::Call {
            device: self.name.clone(),
            call: "cublasGemmEx",
            message: format!("{e:?}"),
        })
    }

    fn synchronise(&self) -> Result<()> {
        self.current()?;
        self.wait()
    }

    fn memory(&self) -> Result<(u64, u64)> {
        self.current()?;
        let (free, total) = self.ok("cuMemGetInfo", result::mem_get_info())?;
        Ok((free as u64, total as u64))
    }

    fn processors(&self) -> usize {
        self.processors
    }
}

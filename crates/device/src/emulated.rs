//! A device of the host's, to test on: kernels compiled by the host's C++ compiler, the host's memory, and a plain matrix
//! product with the order of sums of no one in particular.
//!
//! `CXX` names the compiler (default `c++`), `MINICACHE_EMULATED_FLAGS` adds options such as `-fsanitize=address` (then the
//! process has to be started with the sanitizer's library, and every block of memory is an allocation of its own).

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::HashMap;
use std::fs;
use std::process::Command;
use std::sync::{Arc, Mutex};

use half::{bf16, f16};
use libloading::Library;

use crate::driver::{Act, Address, Driver, Kernel, Product};
use crate::kernels::{Source, compiled};
use crate::{Error, Result};

type Entry = unsafe extern "C" fn(shape: *const u32, params: *const u8);

/// See the module.
#[derive(Debug)]
pub struct Emulated {
    name: String,
    compiler: String,
    version: String,
    flags: Vec<String>,
    /// Bytes that may still be allocated.
    free: Mutex<usize>,
    total: usize,
    modules: Mutex<HashMap<Source, Vec<Kernel>>>,
}

impl Emulated {
    /// A device of `total` bytes.
    ///
    /// # Errors
    /// No C++ compiler.
    pub fn new(index: usize, total: usize) -> Result<Self> {
        let compiler = std::env::var("CXX").ok().filter(|c| !c.is_empty()).unwrap_or_else(|| "c++".into());
        let version = Command::new(&compiler).arg("--version").output().map_err(|e| {
            Error::Missing(format!(
                "the emulated device needs a C++ compiler, and {compiler} cannot be run: {e}"
            ))
        })?;
        let flags = std::env::var("MINICACHE_EMULATED_FLAGS").unwrap_or_default();
        Ok(Self {
            name: format!("emulated:{index}"),
            compiler,
            version: String::from_utf8_lossy(&version.stdout).lines().next().unwrap_or_default().to_string(),
            flags: flags.split_whitespace().map(str::to_string).collect(),
            free: Mutex::new(total),
            total,
            modules: Mutex::default(),
        })
    }

    fn fail(&self, call: &'static str, message: impl ToString) -> Error {
        Error::Call { device: self.name.clone(), call, message: message.to_string() }
    }
}

fn layout(bytes: usize) -> Layout {
    // A size that is no multiple of the alignment, so that a checker sees the end.
    Layout::from_size_align(bytes.max(1), 64).unwrap_or(Layout::new::<u64>())
}

impl Driver for Emulated {
    fn name(&self) -> &str {
        &self.name
    }

    fn describe(&self) -> String {
        format!("emulated by {} ({})", self.compiler, self.version)
    }

    fn allocate(&self, bytes: usize) -> Result<Address> {
        let mut free = self.free.lock().unwrap_or_else(|e| e.into_inner());
        if *free < bytes {
            return Err(Error::Memory { device: self.name.clone(), bytes });
        }
        *free -= bytes;
        // SAFETY: the size is not zero.
        Ok(unsafe { alloc_zeroed(layout(bytes)) } as Address)
    }

    fn free(&self, address: Address, bytes: usize) {
        *self.free.lock().unwrap_or_else(|e| e.into_inner()) += bytes;
        // SAFETY: `Memory` gives back what `allocate` gave it, once, with its size.
        unsafe { dealloc(address as *mut u8, layout(bytes)) };
    }

    fn upload(&self, to: Address, bytes: &[u8]) -> Result<()> {
        // SAFETY: the crate copies into memory that it has allocated, as much as that holds.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to as *mut u8, bytes.len()) };
        Ok(())
    }

    fn download(&self, from: Address, bytes: &mut [u8]) -> Result<()> {
        // SAFETY: as `upload`.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<()> {
        // SAFETY: as `upload`.
        unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) };
        Ok(())
    }

    fn clear(&self, at: Address, bytes: usize) -> Result<()> {
        // SAFETY: as `upload`.
        unsafe { std::ptr::write_bytes(at as *mut u8, 0, bytes) };
        Ok(())
    }

    fn compile(&self, source: &Source) -> Result<Vec<Kernel>> {
        let known = || self.modules.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(kernels) = known().get(source) {
            return Ok(kernels.clone());
        }
        let text = source.text(true);
        let mut options = vec!["-std=c++17", "-O2", "-fPIC", "-shared", "-fno-strict-aliasing", "-w"];
        options.extend(self.flags.iter().map(String::as_str));
        let target = format!("{}\n{}\n{}", self.compiler, self.version, options.join(" "));
        // Nothing is locked meanwhile: several compile at once.
        let path = compiled(&text, &target, "so", |dir| {
            let (from, to) = (dir.join("kernels.cpp"), dir.join("kernels.so"));
            fs::write(&from, &text).map_err(|source| Error::File { path: from.clone(), source })?;
            let output = Command::new(&self.compiler).args(&options).arg(&from).arg("-o").arg(&to).output();
            let output = output.map_err(|e| self.fail("compiler", e))?;
            if !output.status.success() {
                return Err(Error::Compile {
                    file: source.file.name(),
                    device: self.name.clone(),
                    log: String::from_utf8_lossy(&output.stderr).into_owned(),
                });
            }
            fs::read(&to).map_err(|source| Error::File { path: to, source })
        })?;
        // SAFETY: what this crate has compiled has no initialisers of its own.
        let library = unsafe { Library::new(&path) }.map_err(|e| self.fail("dlopen", e))?;
        let library = Arc::new(library);
        let kernels: Result<Vec<Kernel>> = source
            .file
            .kernels()
            .iter()
            .map(|name| {
                // SAFETY: kernels are compiled to this signature.
                let entry =
                    unsafe { library.get::<Entry>(name.as_bytes()) }.map_err(|e| self.fail("dlsym", e))?;
                let handle = *entry as usize;
                Ok(Kernel { handle, threads: source.threads, _module: library.clone() })
            })
            .collect();
        let kernels = kernels?;
        known().insert(source.clone(), kernels.clone());
        Ok(kernels)
    }

    unsafe fn launch(&self, kernel: &Kernel, grid: [u32; 3], params: &[u8]) -> Result<()> {
        let shape = [grid[0], grid[1], grid[2], kernel.threads];
        // The structure's own alignment is not known here: that of its largest member is.
        let mut words = vec![0u64; params.len().div_ceil(8)];
        crate::driver::bytes_of_mut(&mut words)[..params.len()].copy_from_slice(params);
        // SAFETY: `compile` made the handle of a function of this type; the caller vouches for the parameters.
        unsafe {
            let entry: Entry = std::mem::transmute(kernel.handle);
            entry(shape.as_ptr(), words.as_ptr().cast());
        }
        Ok(())
    }

    unsafe fn product(&self, p: &Product) -> Result<()> {
        let widen = |x: u16| match p.act {
            Act::F16 => f16::from_bits(x).to_f32(),
            Act::Bf16 => bf16::from_bits(x).to_f32(),
        };
        // SAFETY: the caller vouches for the sizes.
        let (w, x, y) = unsafe {
            (
                std::slice::from_raw_parts(p.w as *const u16, p.outputs * p.inputs),
                std::slice::from_raw_parts(p.x as *const u16, p.rows * p.inputs),
                std::slice::from_raw_parts_mut(p.y as *mut f32, p.rows * p.outputs),
            )
        };
        let x: Vec<f32> = x.iter().map(|x| widen(*x)).collect();
        for (o, w) in w.chunks_exact(p.inputs).enumerate() {
            let w: Vec<f32> = w.iter().map(|w| widen(*w)).collect();
            for (row, x) in x.chunks_exact(p.inputs).enumerate() {
                let sum: f32 = w.iter().zip(x).map(|(w, x)| w * x).sum();
                let y = &mut y[row * p.outputs + o];
                *y = if p.add { *y + sum } else { sum };
            }
        }
        Ok(())
    }

    fn synchronise(&self) -> Result<()> {
        Ok(())
    }

    fn memory(&self) -> Result<(u64, u64)> {
        let free = *self.free.lock().unwrap_or_else(|e| e.into_inner());
        Ok((free as u64, self.total as u64))
    }

    fn processors(&self) -> usize {
        2
    }

    fn checked(&self) -> bool {
        self.flags.iter().any(|f| f.contains("sanitize"))
    }
}

//! What is asked of a device: memory, kernels and matrix products. `cuda.rs` asks NVIDIA's driver, `emulated.rs` the
//! host.

use std::fmt;
use std::sync::Arc;

use crate::Result;
use crate::kernels::Source;

/// An address on the device.
pub type Address = u64;

/// A compiled kernel: a handle of the driver's, with its module kept alive.
#[derive(Clone)]
pub struct Kernel {
    pub(crate) handle: usize,
    /// Threads of a block.
    pub(crate) threads: u32,
    pub(crate) _module: Arc<dyn Send + Sync>,
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kernel").field("threads", &self.threads).finish_non_exhaustive()
    }
}

/// The type of weights and activations of linear layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Act {
    /// Half precision.
    F16,
    /// bfloat16.
    Bf16,
}

/// Weights or activations of linear layers: as they are rounded, and what rounding left of them, as large, where a model is
/// to be computed as precisely as in f32 (else 0).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Acts {
    /// The nearest.
    pub high: Address,
    /// What is left; or 0.
    pub low: Address,
}

impl Acts {
    /// From row `row` on, of rows of `width`.
    #[must_use]
    pub fn from_row(self, row: usize, width: usize) -> Self {
        let offset = (row * width * 2) as Address;
        Self { high: self.high + offset, low: if self.low == 0 { 0 } else { self.low + offset } }
    }
}

/// `y (rows, outputs) = x (rows, inputs) w (outputs, inputs)^T`, added to y where `add` is set; x and w are `act`, y is f32.
#[derive(Debug, Clone, Copy)]
pub struct Product {
    /// Weights.
    pub w: Address,
    /// Inputs.
    pub x: Address,
    /// Outputs.
    pub y: Address,
    /// Rows of x and y.
    pub rows: usize,
    /// Columns of x and w.
    pub inputs: usize,
    /// Columns of y.
    pub outputs: usize,
    /// Type of w and x.
    pub act: Act,
    /// Whether y is added to.
    pub add: bool,
}

/// A device. Calls are carried out in the order in which they are made; only [`Driver::download`] and
/// [`Driver::synchronise`] wait for them.
pub trait Driver: Send + Sync + fmt::Debug {
    /// Its name, such as `cuda:0`.
    fn name(&self) -> &str;

    /// What it is, in words.
    fn describe(&self) -> String;

    /// Allocates zeroed memory, aligned to 256 bytes.
    ///
    /// # Errors
    /// No memory.
    fn allocate(&self, bytes: usize) -> Result<Address>;

    /// Frees what was allocated.
    fn free(&self, address: Address, bytes: usize);

    /// Copies to the device. The bytes can be changed as soon as it returns.
    ///
    /// # Errors
    /// Of the device.
    fn upload(&self, to: Address, bytes: &[u8]) -> Result<()>;

    /// Copies from the device.
    ///
    /// # Errors
    /// Of the device; those of earlier calls show here.
    fn download(&self, from: Address, bytes: &mut [u8]) -> Result<()>;

    /// Copies on the device.
    ///
    /// # Errors
    /// Of the device.
    fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<()>;

    /// Fills with zeros.
    ///
    /// # Errors
    /// Of the device.
    fn clear(&self, at: Address, bytes: usize) -> Result<()>;

    /// Compiles a file of kernels, or finds it compiled, and gives its kernels by name.
    ///
    /// # Errors
    /// Of the compiler.
    fn compile(&self, source: &Source) -> Result<Vec<Kernel>>;

    /// Runs a kernel: `grid` blocks with `params`, one structure by value.
    ///
    /// # Errors
    /// Of the device.
    ///
    /// # Safety
    /// `params` is the structure that the kernel takes, and what it points to is as large as the kernel expects.
    unsafe fn launch(&self, kernel: &Kernel, grid: [u32; 3], params: &[u8]) -> Result<()>;

    /// A matrix product.
    ///
    /// # Errors
    /// Of the device.
    ///
    /// # Safety
    /// The addresses hold matrices of these sizes.
    unsafe fn product(&self, product: &Product) -> Result<()>;

    /// Waits for everything.
    ///
    /// # Errors
    /// Of the device; those of earlier calls show here.
    fn synchronise(&self) -> Result<()>;

    /// Bytes free, and in all.
    ///
    /// # Errors
    /// Of the device.
    fn memory(&self) -> Result<(u64, u64)>;

    /// Multiprocessors: how many blocks are worth having.
    fn processors(&self) -> usize;

    /// Whether every allocation should be its own, so that a checker sees where each ends.
    fn checked(&self) -> bool {
        false
    }
}

/// Memory of a device, freed when it is dropped.
#[derive(Debug)]
pub struct Memory {
    driver: Arc<dyn Driver>,
    address: Address,
    bytes: usize,
}

impl Memory {
    /// Zeroed memory.
    ///
    /// # Errors
    /// No memory.
    pub fn new(driver: &Arc<dyn Driver>, bytes: usize) -> Result<Self> {
        let bytes = bytes.max(1);
        Ok(Self { driver: driver.clone(), address: driver.allocate(bytes)?, bytes })
    }

    /// With contents.
    ///
    /// # Errors
    /// No memory.
    pub fn of(driver: &Arc<dyn Driver>, bytes: &[u8]) -> Result<Self> {
        let memory = Self::new(driver, bytes.len())?;
        driver.upload(memory.address, bytes)?;
        Ok(memory)
    }

    /// Where it begins.
    pub fn address(&self) -> Address {
        self.address
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// At least so many bytes; contents are lost where it grows.
    ///
    /// # Errors
    /// No memory.
    pub fn reserve(&mut self, bytes: usize) -> Result<Address> {
        if bytes > self.bytes {
            let larger = Self::new(&self.driver, bytes.next_power_of_two().min(bytes + (64 << 20)))?;
            *self = larger;
        }
        Ok(self.address)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.driver.free(self.address, self.bytes);
    }
}

/// Plain data that a device reads as it lies: structures of `repr(C)` without padding, and numbers.
///
/// # Safety
/// No padding, no references.
pub(crate) unsafe trait Plain: Copy {}
// SAFETY: numbers.
unsafe impl Plain for u8 {}
// SAFETY: numbers.
unsafe impl Plain for u16 {}
// SAFETY: numbers.
unsafe impl Plain for u32 {}
// SAFETY: numbers.
unsafe impl Plain for i32 {}
// SAFETY: numbers.
unsafe impl Plain for u64 {}
// SAFETY: numbers.
unsafe impl Plain for f32 {}

/// Data as bytes.
pub(crate) fn bytes_of<T: Plain>(data: &[T]) -> &[u8] {
    // SAFETY: `Plain` has no padding, so all bytes are initialised; any bytes are u8.
    unsafe { std::slice::from_raw_parts(data.as_ptr().cast(), size_of_val(data)) }
}

/// Data as bytes, to be overwritten.
pub(crate) fn bytes_of_mut<T: Plain>(data: &mut [T]) -> &mut [u8] {
    // SAFETY: as `bytes_of`, and any bytes are a number.
    unsafe { std::slice::from_raw_parts_mut(data.as_mut_ptr().cast(), size_of_val(data)) }
}

//! Caches that live on a GPU: the kernels (`cuda/*.cu`), what launches them, and a device of the host's to test them on.
//!
//! A [`Device`] is a driver ([`driver::Driver`]: NVIDIA's, or [`emulated::Emulated`]) with a pool of memory. A
//! [`DeviceCache`] is a [`minicache_core::KvCache`] whose pages lie there, in the host's layout, and [`Devices`] are the
//! [`minicache_core::Backend`] that takes steps of many sequences through attention, merging and packing.
//! `docs/device.md` says how.

mod backend;
mod cache;
pub mod check;
mod cuda;
mod device;
pub mod driver;
mod emulated;
mod error;
mod evicting;
mod held;
pub mod kernels;
mod latents;
mod libraries;
mod method;
mod ops;
mod params;
mod part;
mod pool;
mod step;
mod step_latents;
mod table;

pub use backend::{DeviceStep, Devices};
pub use cache::DeviceCache;
pub use device::Device;
pub use emulated::Emulated;
pub use error::{Error, Result};
pub use method::Arithmetic;
pub use ops::{Norm, Ops, Rotation};
pub use step::DeviceStates;

//! The merge core: merge, retain, quantise, pack, attend and account for KV caches.

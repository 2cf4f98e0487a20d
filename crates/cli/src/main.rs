//! The command `minicache`.
fn main() {}

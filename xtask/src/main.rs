//! Developer commands: `cargo xtask setup|demo|test|vm|vmtest|bench`.
fn main() {}

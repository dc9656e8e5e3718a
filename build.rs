//! Compiles the BPF programs to skeletons and makes Rust types of `bpf/events.h`.

use std::env;
use std::error::Error;
use std::fs;
use std::hash::{DefaultHasher, Hasher};
use std::path::{Path, PathBuf};

use bindgen::callbacks::{DeriveInfo, EnumVariantValue, ItemInfo, ParseCallbacks};
use libbpf_cargo::SkeletonBuilder;

/// One skeleton per purpose, so that reading state works where tracing does not load.
const OBJECTS: &[&str] = &["iter", "track", "netlock", "accept", "probe"];

fn main() -> Result<(), Box<dyn Error>> {
    let bpf = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("bpf");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    for entry in fs::read_dir(&bpf)? {
        println!("cargo::rerun-if-changed={}", entry?.path().display());
    }
    println!("cargo::rerun-if-changed={}", bpf.display());
    println!("cargo::rerun-if-env-changed=CLANG");

    for object in OBJECTS {
        build_object(&bpf, &out, object)?;
    }
    let iterators = fingerprint(&out.join("iter.skel.rs"))?;
    println!("cargo::rustc-env=TRACKER_ITERATORS={iterators:016x}");
    generate_types(&bpf.join("events.h"), &out.join("events.rs"))
}

fn build_object(bpf: &Path, out: &Path, name: &str) -> Result<(), Box<dyn Error>> {
    let mut builder = SkeletonBuilder::new();
    builder
        .source(bpf.join(format!("{name}.bpf.c")))
        .clang_args([
            "-I".into(),
            bpf.as_os_str().to_owned(),
            // <asm/types.h> of Debian's multiarch layout, which -target bpf does not search
            "-idirafter".into(),
            format!(
                "/usr/include/{}-linux-gnu",
                env::var("CARGO_CFG_TARGET_ARCH")?
            )
            .into(),
            "-mcpu=v3".into(),
            "-Wall".into(),
            "-Werror".into(),
            "-Wno-unused-function".into(),
            "-Wno-missing-declarations".into(),
        ]);
    if let Some(clang) = env::var_os("CLANG") {
        builder.clang(clang);
    }
    builder.build_and_generate(out.join(format!("{name}.skel.rs")))?;
    Ok(())
}

/// Of a skeleton, which has the object's bytes and the layout of its variables in it.
fn fingerprint(skeleton: &Path) -> Result<u64, Box<dyn Error>> {
    let mut hasher = DefaultHasher::new();
    hasher.write(&fs::read(skeleton)?);
    Ok(hasher.finish())
}

fn generate_types(header: &Path, output: &Path) -> Result<(), Box<dyn Error>> {
    bindgen::Builder::default()
        .header(header.to_str().ok_or("path of events.h is not UTF-8")?)
        .allowlist_file(".*events\\.h")
        .derive_debug(true)
        .derive_default(true)
        .derive_copy(true)
        .layout_tests(false)
        .prepend_enum_name(false)
        .default_enum_style(bindgen::EnumVariation::ModuleConsts)
        .parse_callbacks(Box::new(RustNames))
        .generate()?
        .write_to_file(output)?;
    Ok(())
}

/// Gives C names the form Rust expects: `thread_rec` becomes `ThreadRec`, and `FILE_PIPE` of
/// `enum file_kind` becomes `FileKind::PIPE` (the first word of an enumerator is its prefix).
#[derive(Debug)]
struct RustNames;

impl ParseCallbacks for RustNames {
    fn item_name(&self, item: ItemInfo<'_>) -> Option<String> {
        let snake = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        let ours = item.name.contains('_') && !item.name.starts_with('_');
        (ours && item.name.chars().all(snake)).then(|| camel_case(item.name))
    }

    /// What tells whether two sockets are alike, what a network lock has, and whether a connection
    /// is what it was.
    fn add_derives(&self, info: &DeriveInfo<'_>) -> Vec<String> {
        let compared = [
            "SockOpts",
            "SockChoices",
            "LockFlowKey",
            "LockPortKey",
            "WaitingRec",
            "RecHdr",
        ]
        .contains(&info.name);
        let derives = ["PartialEq", "Eq", "Hash"];
        derives
            .iter()
            .filter(|_| compared)
            .map(|name| (*name).to_owned())
            .collect()
    }

    fn enum_variant_name(
        &self,
        _enum_name: Option<&str>,
        variant: &str,
        _value: EnumVariantValue,
    ) -> Option<String> {
        variant
            .split_once('_')
            .map(|(_prefix, name)| name.to_owned())
    }
}

fn camel_case(name: &str) -> String {
    name.split('_')
        .map(|word| {
            let (first, rest) = word.split_at(1.min(word.len()));
            first.to_ascii_uppercase() + rest
        })
        .collect()
}

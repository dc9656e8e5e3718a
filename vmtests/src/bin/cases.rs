//! All cases in one program: linking stays cheap, the guest needs one file.

fn main() -> anyhow::Result<()> {
    vmtests::guest::case::main()
}

//! Ring records of any content, from the decoder into the model.
//!
//! An input is a row of records, each behind its length in two bytes. Whatever they hold, the
//! model must not contradict itself, nor keep more than came in.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tracker::bpf::wire::decode;
use tracker::model::apply::apply;
use tracker::model::check::check;
use tracker::model::state::State;
use tracker::track::order::Order;

fuzz_target!(|input: &[u8]| {
    let (mut state, mut order) = (State::default(), Order::default());
    let mut rest = input;
    let mut records = 0;
    while let Some((length, more)) = rest.split_first_chunk::<2>() {
        let length = usize::from(u16::from_le_bytes(*length)).min(more.len());
        let (record, more) = more.split_at(length);
        rest = more;
        records += 1;
        if let Ok(event) = decode(record) {
            // Refused numbers are counted by the agent; here they are only not believed.
            let _ = order.push(event, 1 << 20);
        }
        while let Some(event) = order.pop() {
            apply(&mut state, &event);
        }
    }
    assert!(order.waiting() <= records);
    // As the agent does when what is missing does not come.
    while order.skip_gap() > 0 {
        while let Some(event) = order.pop() {
            apply(&mut state, &event);
        }
    }
    assert_eq!(check(&state), []);
});

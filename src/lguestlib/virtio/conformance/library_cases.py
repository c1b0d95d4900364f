"""What shows inside the library alone, each by the tests that watch over it."""

from lguestlib.virtio.conformance.case import Case, WatchedCase


def _watched(ids: tuple[str, ...], title: str, clause: str, **modules: str) -> WatchedCase:
    """By the tests of such names in tests/virtio, a line each, by module."""
    tests = (
        f"tests/virtio/test_{module}.py::test_{name}"
        for module, names in modules.items()
        for name in names.split()
    )
    return WatchedCase(ids, title, clause, tuple(tests))


LIBRARY_CASES: tuple[Case, ...] = (
    _watched(
        ("S1", "CVE-2017-17381"), "a size that a ring cannot have", "2.7",
        layout="""
            s1_cve_2017_17381_a_size_is_a_power_of_two_from_1_to_32768
        """,
    ),
    _watched(
        ("S2", "CVE-2016-5403"), "an index that cannot be breaks the queue for good", "2.7.13.3",
        split_device="""
            s2_s28_cve_2016_5403_an_impossible_avail_index_breaks_the_queue_for_good
        """,
    ),
    _watched(
        ("S3",), "every small ring as the readable way has it", "2.7.5",
        chain="""
            s3_walk_judges_the_head_too
        """,
        decoding="""
            every_place_for_each_of_a_row_of_three
            every_place_for_each_of_three_in_an_indirect_table
            every_ring_of_one_descriptor
            every_way_to_link_four_descriptors
        """,
    ),
    _watched(
        ("S11",), "a packed ring's table and buffer across two regions", "2.8.7",
        packed_device="""
            s11_s17_a_table_and_a_buffer_across_two_regions
        """,
    ),
    _watched(
        ("S15",), "lengths that add up to as much as can be told", "2.7.8.2",
        packed_device="""
            s15_lengths_may_add_up_to_what_a_used_length_can_tell_and_no_more
        """,
        split_device="""
            s15_lengths_may_add_up_to_what_used_len_can_tell_and_no_more
        """,
    ),
    _watched(
        ("S16",), "parts of a chain end where it does", "2.7.4",
        chain="""
            a_part_is_what_slicing_the_whole_would_give
            read_copies_from_the_start_up_to_its_limit
            write_fills_from_the_start_and_tells_how_much_fitted
        """,
    ),
    _watched(
        ("S18", "CVE-2020-14375", "CVE-2026-93683"), "changed at any moment it is the old or the new", "2.7.5",
        split_device="""
            s18_cve_2020_14375_cve_2026_93683_a_descriptor_changed_at_any_moment_is_the_old_or_the_new
        """,
    ),
    _watched(
        ("S19", "CVE-2024-8612"), "what is returned was taken, and no longer", "2.7.8.2",
        inflight="""
            s19_of_several_chains_those_before_a_refused_one_are_returned_and_recorded
        """,
        inflight_packed="""
            s19_of_several_chains_those_before_a_refused_one_are_returned_and_recorded
        """,
        packed_device="""
            s19_cve_2024_8612_no_more_is_reported_used_than_was_offered
        """,
        split_device="""
            s19_cve_2024_8612_no_more_is_reported_used_than_was_offered
        """,
    ),
    _watched(
        ("S20",), "entries before their index where a record is kept", "2.7.14",
        order="""
            s20_entries_are_published_before_their_index_where_a_record_is_kept
        """,
    ),
    _watched(
        ("S21",), "a fence between what is said and what is heard", "2.7.10",
        order="""
            s21_s22_a_fence_stands_between_what_is_said_and_what_is_heard
            s21_s22_a_fence_stands_between_what_is_said_and_what_is_heard_of_packed_rings
        """,
    ),
    _watched(
        ("S24",), "after a restore the driver is told once", "2.7.10",
        packed_device="""
            s24_after_a_restore_the_driver_is_told_once_whatever_it_asked
        """,
        split_device="""
            s24_after_a_restore_the_driver_is_told_once_whatever_it_asked
        """,
    ),
    _watched(
        ("S26",), "notify on empty overrides suppression", "2.7.7",
        split_device="""
            s26_notify_on_empty_overrides_suppression_where_negotiated
        """,
    ),
    _watched(
        ("S27",), "good chains first, then the error, once", "2.7.5",
        packed_device="""
            s27_a_malformed_chain_is_an_error_the_ring_goes_past_by_its_whole_length
        """,
        split_device="""
            a_half_is_of_what_there_is_alone_when_the_ring_has_been_empty
            half_of_what_the_driver_has_out_can_be_asked_for_the_last_half_included
            s27_a_malformed_chain_is_an_error_the_ring_goes_past
            what_is_put_back_comes_again_and_so_does_the_error_behind_it
            what_was_found_behind_good_chains_is_told_once_and_gone_past
        """,
    ),
    _watched(
        ("S28",), "descriptors in flight are not available", "2.8.6",
        packed_device="""
            s28_descriptors_that_are_in_flight_cannot_be_available
            s28_nor_can_those_that_a_short_cut_would_take
        """,
    ),
    _watched(
        ("S29",), "an ID that is in flight", "2.8.16",
        packed_device="""
            s29_an_id_twice_in_one_batch
            s29_good_chains_before_a_malformed_one_come_first
            s29_p4_an_id_made_available_while_in_flight
        """,
    ),
    _watched(
        ("S32", "CVE-2026-86565"), "a ready queue stays as it was set up", "4.2.3.2",
        mmio="""
            s32_t6_cve_2026_86565_a_ready_queue_stays_as_it_was_set_up
        """,
    ),
    _watched(
        ("S34", "CVE-2019-3900"), "how far a packed ring is looked through", "2.8.6",
        packed_device="""
            s34_cve_2019_3900_an_endless_supply_is_taken_in_batches
            s34_how_far_is_looked_is_by_how_many_are_asked_for
        """,
    ),
    _watched(
        ("P2",), "every small packed ring as the readable way has it", "2.8.6",
        packed_decoding="""
            every_chain_of_one_descriptor
            every_place_for_each_of_a_row_of_three
            every_way_to_flag_three_descriptors_at_every_place_of_two_laps
        """,
        packed_device="""
            p2_a_chain_goes_round_the_end_at_every_place
            p2_p5_every_size_and_every_way_to_cut_a_lap_into_chains
        """,
    ),
    _watched(
        ("P6",), "an interrupt if and only if it was asked for", "2.8.10",
        packed_device="""
            p6_s24_an_interrupt_is_due_if_and_only_if_the_driver_has_asked_or_talks_nonsense
        """,
    ),
    _watched(
        ("P8",), "a position that the ring does not have", "2.8.13",
        packed_device="""
            p8_t15_the_state_is_two_positions_and_one_the_ring_has_not_is_refused
        """,
    ),
    _watched(
        ("T1",), "statuses and features only in their order", "3.1.1",
        mmio="""
            features_of_the_transports_own_are_offered_unless_withheld_and_count_where_agreed_on
            t1_features_are_frozen_by_features_ok_and_not_taken_before_driver
            t1_what_was_not_offered_is_never_among_the_features
        """,
        pci_transport="""
            t1_t5_t6_any_sequence_of_accesses_leaves_a_state_the_specification_knows
        """,
        status="""
            t1_a_driver_that_keeps_the_order_arrives
            t1_after_failed_or_needs_reset_there_is_no_going_on
        """,
    ),
    _watched(
        ("T3", "CVE-2026-45782"), "a reset is over when its owner says so", "2.4.1",
        mmio="""
            t3_cve_2026_45782_a_reset_is_over_only_when_its_owner_says_so_and_leaves_nothing
        """,
        pci_transport="""
            t3_cve_2026_45782_a_reset_is_over_only_when_its_owner_says_so_and_leaves_nothing
        """,
    ),
    _watched(
        ("T4",), "a queue reset by itself, where agreed on", "2.6.1",
        mmio="""
            t4_a_queue_is_reset_by_itself_where_that_was_agreed_on
            t4_no_queue_is_reset_where_it_was_not_agreed_on
        """,
        pci_transport="""
            t4_a_queue_is_not_reset_where_that_was_not_offered_or_not_accepted
            t4_a_queue_is_reset_by_itself_and_reads_so_until_it_has_stopped
        """,
    ),
    _watched(
        ("T5",), "virtio-mmio's registers", "4.2.2",
        mmio="""
            a_failed_device_asks_for_a_reset_and_interrupts_only_a_driver_that_is_ready
            driver_ok_is_told_once_with_the_features_and_the_queues
            t5_a_reported_change_is_a_new_generation_and_an_interrupt
            t5_the_config_space_takes_any_width_and_reads_zero_past_its_end
            t5_the_registers_are_those_of_the_table_and_no_others
            used_buffers_that_nobody_notes_are_told_of_while_the_driver_is_live
        """,
    ),
    _watched(
        ("T5",), "slots of a PCI bus, and what is in none", "4.1.2",
        pci_bus="""
            a_function_is_found_by_the_address_of_its_registers
            absent_functions_read_as_ones_and_take_nothing
            the_address_port_takes_32_bits_at_once_and_keeps_what_is_defined
            the_bridge_is_in_slot_0_and_the_devices_behind_it
            the_data_port_has_four_lanes
            there_are_31_slots_for_devices
            without_the_enable_bit_the_data_port_is_nothing
        """,
    ),
    _watched(
        ("T5",), "the header, capabilities and BARs of PCI", "4.1.3",
        pci_config="""
            a_bar_is_where_it_was_put_while_memory_is_decoded
            a_bar_that_cannot_be_is_refused
            a_capability_past_the_256_bytes_is_refused
            an_asserted_pin_shows_in_the_status
            capabilities_are_a_list_on_dwords_that_the_status_announces
            of_the_command_register_what_means_something_here_can_be_set
            the_header_is_that_of_a_type_0_function
            there_is_no_extended_capability_and_nothing_past_4096_bytes
        """,
    ),
    _watched(
        ("T5",), "the structures of PCI, and nothing between them", "4.1.4",
        pci_function="""
            each_structure_answers_where_its_capability_says
            more_queues_than_there_are_vectors_for_are_refused
            nothing_but_its_data_is_an_access_through_the_window
            of_a_write_through_the_window_as_much_is_taken_as_it_is_wide
            registers_are_reached_through_configuration_space_without_a_bar
            t5_a_window_that_cannot_be_reaches_nothing
            t5_any_access_is_answered_and_what_is_told_is_how_it_is
            t5_between_the_structures_there_is_nothing
            the_pin_is_asserted_until_the_isr_is_read
            the_pin_is_silent_while_it_is_disabled_or_interrupts_are_messages
            the_table_and_the_pending_bits_read_where_the_capability_says
            vectors_are_told_of_when_the_table_or_the_control_changes
        """,
    ),
    _watched(
        ("T5",), "MSI-X: masks, pending bits and messages", "4.1.4.5.1",
        pci_msix="""
            a_table_has_1_to_2048_vectors
            a_vector_sends_its_message_when_it_is_unmasked_and_msix_enabled
            every_vector_is_masked_at_first_with_an_empty_message
            masked_interrupts_pend_and_show
            only_the_mask_bit_of_the_control_can_be_set
            t5_an_access_that_is_not_aligned_or_not_inside_does_nothing
            the_function_mask_masks_all_and_leaves_the_vectors_own
        """,
    ),
    _watched(
        ("T5",), "the common registers of PCI", "4.1.4.3",
        pci_transport="""
            a_queue_is_disabled_by_a_reset_alone
            driver_ok_is_told_once_with_the_features
            each_queue_is_notified_at_an_address_of_its_own
            t5_only_the_writable_registers_take_a_write
            t5_the_registers_are_those_of_the_table_each_as_wide_as_it_is
            the_generation_changes_with_the_config_space_and_has_8_bits
            vectors_are_assigned_to_the_config_space_and_to_queues
            what_a_driver_has_written_reads_back
        """,
    ),
    _watched(
        ("T6", "CVE-2011-2512", "CVE-2017-17381"), "queues and pages of features that are not there", "4.2.3.2",
        mmio="""
            t6_cve_2011_2512_a_queue_that_does_not_exist
            t6_cve_2017_17381_a_size_that_cannot_be_leaves_the_old_one
            t6_pages_of_features_that_do_not_exist
        """,
        pci_transport="""
            t6_cve_2011_2512_a_queue_that_does_not_exist
        """,
        vhost_user_backend="""
            t6_a_ring_that_is_not_there_is_refused
        """,
    ),
    _watched(
        ("T7",), "a queue reads not ready when it has stopped", "4.2.2.1",
        mmio="""
            t7_a_queue_reads_not_ready_only_when_it_has_stopped
        """,
    ),
    _watched(
        ("T8",), "a ring is served once all is told, in any order", "vhost-user: ring states",
        vhost_user_backend="""
            t8_a_ring_is_served_once_all_is_told_whatever_comes_last
        """,
    ),
    _watched(
        ("T11",), "the no-descriptor bit and the descriptor agree", "vhost-user: SET_VRING_KICK",
        vhost_user_backend="""
            t11_the_no_fd_bit_and_the_descriptor_agree_and_no_other_bit_is_known
        """,
    ),
    _watched(
        ("T12",), "what a served ring depends on changes its setup", "vhost-user: SET_MEM_TABLE",
        vhost_user_backend="""
            t12_whatever_a_served_ring_depends_on_changes_its_setup
        """,
    ),
    _watched(
        ("T13",), "regions and slots that cannot be", "vhost-user: memory regions",
        vhost_user_memory_table="""
            a_region_to_remove_is_known_by_addresses_and_size_and_not_by_its_offset
            a_table_never_changes
            a_user_address_is_translated_from_a_regions_first_byte_to_its_last
            t13_an_empty_region_and_one_past_the_end_of_addresses_are_refused
            there_are_as_many_slots_as_are_offered_and_no_more
        """,
    ),
    _watched(
        ("T14",), "messages, payloads and descriptors that do not agree", "vhost-user: message",
        vhost_user_backend="""
            a_config_change_is_told_on_the_channel_where_there_is_one_and_config_was_negotiated
            a_request_of_a_protocol_feature_is_refused_without_it
            a_request_that_is_not_known_is_refused
            a_status_is_what_was_set_and_what_became_of_the_device
            a_used_ring_is_logged_where_its_flag_says_also_while_it_is_served
            any_part_of_the_config_space_reads_as_it_is_and_zeros_behind_it
            enabling_is_0_or_1_and_asks_for_the_ring_to_be_looked_at
            every_feature_that_was_not_offered_is_refused
            every_protocol_feature_that_was_not_offered_is_refused
            features_do_not_change_while_a_ring_is_served_but_for_the_log
            t14_a_payload_of_another_length_is_refused
            t14_too_few_and_too_many_descriptors_are_refused_and_closed
        """,
        vhost_user_message="""
            a_number_is_eight_bytes
            t14_a_message_is_the_same_however_it_is_cut
            t14_too_many_descriptors_are_refused_and_still_there_to_be_closed
        """,
    ),
    _watched(
        ("T15",), "a base or a size that cannot be, or changes under way", "vhost-user: SET_VRING_BASE",
        device_queue="""
            a_split_ring_has_no_state_of_its_used_half
            the_features_say_which_kind_of_queue_and_of_record
        """,
        vhost_user_backend="""
            t15_a_ring_that_is_served_keeps_its_size_base_and_place
            t15_a_size_that_is_no_power_of_two_up_to_32768_is_refused
        """,
    ),
    _watched(
        ("T16", "CVE-2020-10722"), "pages marked, and logs too small", "vhost-user: migration",
        queue_log="""
            of_a_packed_ring_too_what_is_not_to_be_logged_is_not
            of_chains_that_are_refused_and_those_after_them_none_is_returned
            t16_a_log_too_small_for_a_packed_ring_is_refused
            t16_cve_2020_10722_a_log_too_small_for_what_is_logged_is_refused
            t16_every_page_the_device_may_have_written_is_marked
            t16_of_a_packed_ring_the_descriptors_written_over_are_marked_where_they_are
            the_flags_and_the_event_are_marked
            the_used_rings_pages_are_marked_by_its_log_address
            what_is_not_to_be_logged_is_not
        """,
    ),
    _watched(
        ("T17", "CVE-2026-86565"), "a record taken back, or refused as it is", "vhost-user: inflight I/O tracking",
        inflight="""
            a_head_that_waits_to_be_resumed_may_have_become_malformed
            a_part_is_its_header_and_an_entry_for_each_descriptor_to_the_next_64_bytes
            cve_2026_86565_a_record_for_a_smaller_queue_is_refused_and_one_for_a_larger_serves
            t17_a_batch_whose_return_was_cut_short_is_brought_to_its_end
            t17_a_record_that_cannot_be_is_refused_and_nothing_is_changed
            t17_heads_in_flight_come_first_in_the_order_of_their_counters
            t17_random_records_are_refused_or_give_each_head_once
            t17_what_was_resumed_comes_before_what_still_waits_when_it_is_put_back
            t17_what_was_resumed_stays_marked_and_first_when_it_is_put_back
            the_record_is_byte_for_byte_the_specifications
            what_lies_behind_the_last_entry_is_neither_read_nor_written
        """,
        inflight_packed="""
            a_malformed_chain_stays_the_next_in_turn
            a_part_is_its_header_and_an_entry_for_each_descriptor_to_the_next_64_bytes
            a_record_of_noise_ends_in_a_typed_error_or_in_a_device
            cve_2026_86565_a_record_that_cannot_be_is_refused_and_left_as_it_was
            more_descriptors_in_flight_than_the_ring_has_cannot_be_in_a_record_that_has_room_for_them
            no_more_are_taken_and_recorded_than_were_asked_for
            t17_a_batch_of_which_the_driver_has_seen_nothing_is_undone_round_the_rings_end_too
            t17_killed_at_every_store_and_started_again_each_request_is_completed_once
            the_record_is_byte_for_byte_the_specifications
            what_was_in_flight_comes_first_and_can_be_put_back
        """,
        vhost_user_backend="""
            t17_an_inflight_record_of_an_impossible_shape_is_refused
            t17_the_inflight_record_is_made_for_the_rings_and_the_size_asked_for
            t17_the_inflight_record_is_taken_back
        """,
    ),
    _watched(
        ("T18",), "whoever asks for an answer gets it", "vhost-user: REPLY_ACK",
        vhost_user_backend="""
            t18_a_failure_is_told_to_who_asked_and_ends_the_conversation_of_who_did_not
            t18_need_reply_gets_an_answer_where_there_is_none_already_and_it_was_negotiated
        """,
    ),
    _watched(
        ("T21",), "lguest's page and bus", "lguest_launcher.h",
        lguest="""
            a_changed_configuration_is_put_in_its_place
            a_driver_that_has_failed_says_so
            a_kick_starts_no_device_that_has_no_driver
            early_text_without_an_end_ends_with_ram_or_at_a_limit
            features_that_were_not_offered_are_not_negotiated
            t21_a_later_kernel_starts_the_device_with_its_one_notification_of_the_status
            t21_an_older_kernel_tells_of_every_status_and_accepts_features_in_between
            t21_what_a_u8_cannot_count_is_cut
            the_bus_has_256_device_pages
            the_bus_has_31_interrupts
            the_page_has_4096_bytes
            the_page_is_the_c_launchers_of_linux_3_11
            whatever_is_notified_with_whatever_in_memory_is_an_effect_or_nothing
            where_ram_ends_there_is_no_text_even_without_a_device
        """,
    ),
)  # fmt: skip
"""Of the S, P and T rows."""

"""The question of the kernel's demand_paging_test: how many missed pages a second, by number of vCPUs."""

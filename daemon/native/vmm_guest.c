/*
 * vmm_walk.h in x86-64 machine code.
 *
 *   r8  tick            r9  slice mask       r10 tick limit     r11 pages in the slice
 *   r12 first page      r13 address of it    r14 progress word  r15 scatter multiplier
 *   rbx seed            rbp scatter shift in bits 0-7, slice bits in bits 8-15
 *   rax, rcx, rdx, rsi, rdi scratch; rdi is the page's global index from its computation on
 *
 * `inc` is the only instruction that changes migrated memory and `mov r8, rax` the only one that moves the walk, so
 * RIP and R8 alone tell every counter at any instruction boundary: the page of this tick is counted exactly when RIP
 * lies from guest_advance to guest_commit.
 */
#include "vmm_guest.h"

#if defined(__x86_64__)

__asm__(
	".pushsection .rodata\n"
	".intel_syntax noprefix\n"
	".balign 16\n"
	".hidden guest_code, guest_advance, guest_commit, guest_code_end\n"
	".globl guest_code, guest_advance, guest_commit, guest_code_end\n"
	"guest_code:\n"
	"	cmp r8, r10\n"
	"	jae 8f\n"
	/* rax = position of this tick */
	"	mov ecx, ebp\n"
	"	mov rax, r8\n"
	"	and rax, r9\n"
	"	imul rax, r15\n"
	"	and rax, r9\n"
	"	mov rdx, rax\n"
	"	shr rdx, cl\n"
	"	xor rax, rdx\n"
	"	imul rax, r15\n"
	"	and rax, r9\n"
	"	mov rdx, rax\n"
	"	shr rdx, cl\n"
	"	xor rax, rdx\n"
	"	cmp rax, r11\n"
	"	jae guest_advance\n"
	"	lea rdi, [r12 + rax]\n"
	"	mov rsi, rax\n"
	"	shl rsi, 12\n"
	"	add rsi, r13\n"
	/* rax = hash of the page */
	"	movabs rax, 0x9e3779b97f4a7c15\n"
	"	imul rax, rdi\n"
	"	add rax, rbx\n"
	"	mov rdx, rax\n"
	"	shr rdx, 32\n"
	"	xor rax, rdx\n"
	"	movabs rdx, 0xbf58476d1ce4e5b9\n"
	"	imul rax, rdx\n"
	"	mov rdx, rax\n"
	"	shr rdx, 29\n"
	"	xor rax, rdx\n"
	"	movabs rdx, 0x94d049bb133111eb\n"
	"	imul rax, rdx\n"
	"	mov rdx, rax\n"
	"	shr rdx, 32\n"
	"	xor rax, rdx\n"
	"	mov rdx, rax\n"
	"	shr rdx, 61\n"
	"	cmp edx, 2\n"
	"	jb guest_advance\n"
	/* The counter must be the number of passes done. */
	"	shr ecx, 8\n"
	"	mov rdx, r8\n"
	"	shr rdx, cl\n"
	"	cmp [rsi], rax\n"
	"	jne 6f\n"
	"	cmp [rsi + 8], rdx\n"
	"	jne 7f\n"
	"5:	inc qword ptr [rsi + 8]\n"
	"guest_advance:\n"
	"	lea rax, [r8 + 1]\n"
	"	mov [r14], rax\n"
	"guest_commit:\n"
	"	mov r8, rax\n"
	"	jmp guest_code\n"
	"6:	out 0x11, al\n"
	"	jmp 5b\n"
	"7:	out 0x12, al\n"
	"	jmp 5b\n"
	"8:	out 0x10, al\n"
	"	jmp 8b\n"
	"guest_code_end:\n"
	".att_syntax prefix\n"
	".popsection\n");

_Static_assert(GUEST_PORT_DONE == 0x10 && GUEST_PORT_WRONG_ID == 0x11 && GUEST_PORT_WRONG_COUNTER == 0x12,
	       "the ports are literals above");

#else

const uint8_t guest_code[1], guest_advance[1], guest_commit[1], guest_code_end[1];

#endif

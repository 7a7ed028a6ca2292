# A guest in a boot sector: walks over its pages for ever and checks what it finds.
#
# Assembled with PAGES (a power of two), STRIDE and STEP: page numbers follow n -> (STRIDE * n + STEP) mod PAGES, which
# visits every page once a round if STEP is odd and STRIDE mod 4 is 1 (Hull and Dobell). STRIDE 1 is sequential.
#
# Each page has the number of rounds in its first word and in its last, and its own address in its second. A page that
# was lost, zeroed, stale, torn or put elsewhere does not. On the serial port: 'A' at the start, 'B' after each round,
# 'E' for each page that is not as it was left.
.code16
.globl _start
_start:
	cli
	xorw	%ax, %ax
	movw	%ax, %ds
	inb	$0x92, %al		# A20
	orb	$2, %al
	outb	%al, $0x92
	lgdt	descriptors_at
	movl	%cr0, %eax
	orl	$1, %eax
	movl	%eax, %cr0
	ljmp	$8, $protected

.code32
protected:
	movw	$16, %ax
	movw	%ax, %ds
	movw	%ax, %es
	movw	%ax, %ss
	movw	$0x3f8, %dx
	movb	$'A', %al
	outb	%al, %dx
	xorl	%ebp, %ebp		# rounds so far
	xorl	%esi, %esi		# page number

round:
	movl	$PAGES, %ecx
page:
	movl	%esi, %ebx
	shll	$12, %ebx
	addl	$0x100000, %ebx
	cmpl	%ebp, (%ebx)
	jne	wrong
	cmpl	%ebp, 4092(%ebx)
	jne	wrong
	testl	%ebp, %ebp
	jz	good			# before the first round the address is not there yet
	cmpl	%ebx, 4(%ebx)
	je	good
wrong:
	movb	$'E', %al
	outb	%al, %dx
good:
	leal	1(%ebp), %eax
	movl	%eax, (%ebx)
	movl	%ebx, 4(%ebx)
	movl	%eax, 4092(%ebx)
	imull	$STRIDE, %esi
	addl	$STEP, %esi
	andl	$(PAGES - 1), %esi
	decl	%ecx
	jnz	page
	incl	%ebp
	movb	$'B', %al
	outb	%al, %dx
	jmp	round

.align 8
descriptors:
	.quad	0
	.quad	0x00cf9a000000ffff	# code: 4 GiB from 0
	.quad	0x00cf92000000ffff	# data
descriptors_at:
	.word	23
	.long	descriptors
.org 510
	.word	0xaa55
